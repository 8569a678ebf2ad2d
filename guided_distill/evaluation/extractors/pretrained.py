"""From the tensors of a published checkpoint to the weights of a network of ours.

Each of our layers is a convolution or matrix with a bias. Published ones are followed by a batch norm,
which at fixed statistics is a scale and a shift of each channel: both are folded in.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from guided_distill.errors import UserError
from guided_distill.formats.safetensors_file import is_floating
from guided_distill.formats.torch_file import read_state_dict

NORM_EPSILON = 1e-3
"""Of the batch norms of both networks, Lite0 and Inception."""

_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


class Source(NamedTuple):
    """Where a layer's weights are: the tensors `weights`.weight and those of its batch norm.

    Without a batch norm the layer has a bias of its own, `weights`.bias.
    """

    weights: str
    norm: str | None


def read_params(
    path: epath.Path, shapes: Any, source: Callable[[tuple[str, ...]], Source]
) -> dict[str, Any]:
    """The weights of a network, read from a file of torch's layout.

    shapes: the tree of the network's weights, each layer a {"kernel", "bias"}. source: from the path
    of a layer in that tree to its tensors.

    Raises UserError if the file can't be read, or naming the first tensor that is missing, of
    another shape, not floating-point, or not of this network.
    """
    tensors = read_state_dict(path)
    _check_layout(path, tensors, tensor_shapes(shapes, source))
    params: dict[tuple[str, ...], np.ndarray] = {}
    for layer in _kernels(shapes):
        kernel, bias = _folded(tensors, source(layer))
        params[*layer, "kernel"], params[*layer, "bias"] = kernel, bias
    return traverse_util.unflatten_dict(params)


def tensor_shapes(
    shapes: Any, source: Callable[[tuple[str, ...]], Source]
) -> dict[str, tuple[int, ...]]:
    """The tensors that a file of the network must hold; arguments as for `read_params`."""
    expected: dict[str, tuple[int, ...]] = {}
    for layer, kernel in _kernels(shapes).items():
        weights, norm = source(layer)
        # Ours is [height, width, in, out] or [in, out], torch's [out, in, height, width] or [out, in].
        expected[f"{weights}.weight"] = (*kernel[:-3:-1], *kernel[:-2])
        others = [f"{weights}.bias"] if norm is None else [f"{norm}.{part}" for part in _NORM_PARTS]
        expected |= dict.fromkeys(others, (kernel[-1],))
    return expected


def _kernels(shapes: Any) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The kernel's shape of every layer."""
    flat = traverse_util.flatten_dict(shapes)
    return {key[:-1]: leaf.shape for key, leaf in flat.items() if key[-1] == "kernel"}


def fingerprint(path: epath.Path) -> str:
    """The first 8 hex digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


def check_images(extractor: str, shape: tuple[int, ...]) -> None:
    """Raises UserError unless data of `shape` are images [H, W, 1 or 3]."""
    if len(shape) != 3 or shape[-1] not in (1, 3):
        raise UserError(
            f"the extractor {extractor} takes gray or colour images, and an example of this data has "
            f"shape {list(shape)}: choose --extractor classifier"
        )


def to_colour_squares(images: jax.Array, side: int, *, smooth: bool) -> jax.Array:
    """Images [B, H, W, 1 or 3] -> [B, side, side, 3]: gray thrice, resized bilinearly.

    smooth: whether to smooth images that shrink, so that no pixel goes unseen.
    """
    images = jnp.broadcast_to(images, (*images.shape[:-1], 3))
    shape = (len(images), side, side, 3)
    if images.shape == shape:
        return images
    return jax.image.resize(images, shape, "bilinear", antialias=smooth)


def _check_layout(
    path: epath.Path, tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]
) -> None:
    advice = "give a file of the network that the extractor's name says"
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{path} has no tensor {name}, which should be {shape}: {advice}")
        if tensors[name].shape != shape:
            raise UserError(
                f"{path} holds {name} of shape {tensors[name].shape}, which should be {shape}: {advice}"
            )
        if not is_floating(tensors[name].dtype):
            raise UserError(
                f"{path} holds {name} as {tensors[name].dtype}, which should be floating-point: {advice}"
            )
    for name, tensor in tensors.items():
        if name not in expected and not name.endswith("num_batches_tracked"):
            raise UserError(
                f"{path} holds {name!r:.80} of shape {tensor.shape}, which this network has not: {advice}"
            )


def _folded(tensors: Mapping[str, np.ndarray], source: Source) -> tuple[np.ndarray, np.ndarray]:
    weights = tensors[f"{source.weights}.weight"].astype(np.float64)
    kernel = np.moveaxis(weights, (0, 1), (-1, -2))
    if source.norm is None:
        bias = tensors[f"{source.weights}.bias"].astype(np.float64)
    else:
        gain, shift, mean, variance = (
            tensors[f"{source.norm}.{part}"].astype(np.float64) for part in _NORM_PARTS
        )
        scale = gain / np.sqrt(variance + NORM_EPSILON)
        kernel, bias = kernel * scale, shift - mean * scale
    return kernel.astype(np.float32), bias.astype(np.float32)
