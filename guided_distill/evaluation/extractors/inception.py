"""The InceptionV3 of the FID literature: features [2048] and 1008 logits. The user supplies the weights.

The network is that of Szegedy et al. 2015 (arXiv:1512.00567) in its first TensorFlow release: average
pools don't count their padding, and the last block uses a max pool. The weights are those of the package
pytorch-fid, whose tensor names ours follow. The Fréchet distance in these features is FID.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath

from guided_distill.evaluation.extractors.extractor import Extractor
from guided_distill.evaluation.extractors.pretrained import (
    Source,
    check_images,
    fingerprint,
    read_params,
    to_colour_squares,
)
from guided_distill.places import path_named

FEATURES = 2048
CLASSES = 1008
SIDE = 299
BATCH = 32


class _Block(nn.Module):
    """A part of the network; each layer has the name that it has in the weights file."""

    def conv(
        self, x: jax.Array, name: str, channels: int, kernel: tuple[int, int] = (1, 1), **how: Any
    ) -> jax.Array:
        return nn.relu(nn.Conv(channels, kernel, name=name, **how)(x))


def _average(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _largest(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (1, 1), "SAME")


def _halved(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")


_HALVING: dict[str, Any] = {"strides": (2, 2), "padding": "VALID"}


class _A(_Block):
    pooled: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = self.conv(x, "branch5x5_1", 48)
        deep = self.conv(x, "branch3x3dbl_1", 64)
        deep = self.conv(deep, "branch3x3dbl_2", 96, (3, 3))
        parts = [
            self.conv(x, "branch1x1", 64),
            self.conv(wide, "branch5x5_2", 64, (5, 5)),
            self.conv(deep, "branch3x3dbl_3", 96, (3, 3)),
            self.conv(_average(x), "branch_pool", self.pooled),
        ]
        return jnp.concatenate(parts, axis=-1)


class _B(_Block):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        deep = self.conv(x, "branch3x3dbl_1", 64)
        deep = self.conv(deep, "branch3x3dbl_2", 96, (3, 3))
        parts = [
            self.conv(x, "branch3x3", 384, (3, 3), **_HALVING),
            self.conv(deep, "branch3x3dbl_3", 96, (3, 3), **_HALVING),
            _halved(x),
        ]
        return jnp.concatenate(parts, axis=-1)


class _C(_Block):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        once = self.conv(x, "branch7x7_1", self.width)
        once = self.conv(once, "branch7x7_2", self.width, (1, 7))
        twice = self.conv(x, "branch7x7dbl_1", self.width)
        twice = self.conv(twice, "branch7x7dbl_2", self.width, (7, 1))
        twice = self.conv(twice, "branch7x7dbl_3", self.width, (1, 7))
        twice = self.conv(twice, "branch7x7dbl_4", self.width, (7, 1))
        parts = [
            self.conv(x, "branch1x1", 192),
            self.conv(once, "branch7x7_3", 192, (7, 1)),
            self.conv(twice, "branch7x7dbl_5", 192, (1, 7)),
            self.conv(_average(x), "branch_pool", 192),
        ]
        return jnp.concatenate(parts, axis=-1)


class _D(_Block):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        narrow = self.conv(x, "branch3x3_1", 192)
        wide = self.conv(x, "branch7x7x3_1", 192)
        wide = self.conv(wide, "branch7x7x3_2", 192, (1, 7))
        wide = self.conv(wide, "branch7x7x3_3", 192, (7, 1))
        parts = [
            self.conv(narrow, "branch3x3_2", 320, (3, 3), **_HALVING),
            self.conv(wide, "branch7x7x3_4", 192, (3, 3), **_HALVING),
            _halved(x),
        ]
        return jnp.concatenate(parts, axis=-1)


class _E(_Block):
    by_maximum: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        once = self.conv(x, "branch3x3_1", 384)
        twice = self.conv(x, "branch3x3dbl_1", 448)
        twice = self.conv(twice, "branch3x3dbl_2", 384, (3, 3))
        pooled = _largest(x) if self.by_maximum else _average(x)
        parts = [
            self.conv(x, "branch1x1", 320),
            self.conv(once, "branch3x3_2a", 384, (1, 3)),
            self.conv(once, "branch3x3_2b", 384, (3, 1)),
            self.conv(twice, "branch3x3dbl_3a", 384, (1, 3)),
            self.conv(twice, "branch3x3dbl_3b", 384, (3, 1)),
            self.conv(pooled, "branch_pool", 192),
        ]
        return jnp.concatenate(parts, axis=-1)


class InceptionV3(_Block):
    """The network, with its batch norms folded into the layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B, H, W, 3] in [-1, 1], H and W at least 75 -> (features [B, 2048], logits [B, 1008]).

        The logits omit their bias, as in the original code of the Inception Score.
        """
        x = self.conv(x, "Conv2d_1a_3x3", 32, (3, 3), **_HALVING)
        x = self.conv(x, "Conv2d_2a_3x3", 32, (3, 3), padding="VALID")
        x = _halved(self.conv(x, "Conv2d_2b_3x3", 64, (3, 3)))
        x = self.conv(x, "Conv2d_3b_1x1", 80)
        x = _halved(self.conv(x, "Conv2d_4a_3x3", 192, (3, 3), padding="VALID"))
        for name, pooled in (("5b", 32), ("5c", 64), ("5d", 64)):
            x = _A(pooled, name=f"Mixed_{name}")(x)
        x = _B(name="Mixed_6a")(x)
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            x = _C(width, name=f"Mixed_{name}")(x)
        x = _D(name="Mixed_7a")(x)
        x = _E(by_maximum=False, name="Mixed_7b")(x)
        x = _E(by_maximum=True, name="Mixed_7c")(x)
        features = x.mean(axis=(1, 2))
        return features, nn.Dense(CLASSES, use_bias=False, name="fc")(features)


def inception_params(path: epath.Path) -> dict[str, Any]:
    """Read a .pth or .safetensors file with pytorch-fid's names. Raises UserError as `read_params`."""
    return read_params(path, param_shapes(), source)


def param_shapes() -> Any:
    """The shapes of the network's weights, as a tree."""
    example = jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32)
    return jax.eval_shape(InceptionV3().init, jax.random.key(0), example)["params"]


def source(layer: tuple[str, ...]) -> Source:
    """The tensors of a layer in pytorch-fid's weights."""
    name = ".".join(layer)
    return Source(name, None) if name == "fc" else Source(f"{name}.conv", f"{name}.bn")


def inception_extractor(shape: tuple[int, ...], path: str) -> Extractor:
    """The extractor for images of `shape` [H, W, C], with the weights in the file `path`.

    Images are resized bilinearly to 299 x 299, without antialiasing, as in pytorch-fid. Raises UserError
    if the data are not gray or colour images, or if the weights can't be read.
    """
    check_images("inception", shape)
    file = path_named(path)
    params = inception_params(file)
    return Extractor(
        name=f"inception-{fingerprint(file)}",
        width=FEATURES,
        own_classes=False,
        apply=_apply,
        params=params,
        batch_size=BATCH,
    )


def _apply(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = to_colour_squares(images, SIDE, smooth=False)
    with jax.default_matmul_precision("highest"):
        outputs: Any = InceptionV3().apply({"params": params}, x)
    return outputs
