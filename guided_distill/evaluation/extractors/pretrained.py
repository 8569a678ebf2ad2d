"""Convert the tensors of a published checkpoint to the weights of one of this package's networks.

Each of our layers is a convolution or a matrix with a bias. Published layers are followed by a batch
norm; with fixed statistics it scales and shifts each channel, which is folded into the layer.
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
"""The epsilon of the batch norms of both networks, Lite0 and Inception."""

_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


class Source(NamedTuple):
    """The tensors of a layer: `weights`.weight, and those of its batch norm `norm`.

    A layer without a batch norm has its own bias, `weights`.bias.
    """

    weights: str
    norm: str | None


def read_params(
    path: epath.Path, shapes: Any, source: Callable[[tuple[str, ...]], Source]
) -> dict[str, Any]:
    """Read the weights of a network from a file of torch's layout.

    shapes: the tree of the network's weights, each layer a {"kernel", "bias"}. source: maps the path of a
    layer in that tree to its tensors.

    Raises UserError if the file can't be read. If a tensor is missing, has another shape, is not
    floating-point or is not of this network, the error names the first such tensor.
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
    """The tensors that a file of the network must hold; arguments as in `read_params`."""
    expected: dict[str, tuple[int, ...]] = {}
    for layer, kernel in _kernels(shapes).items():
        weights, norm = source(layer)
        # Ours are [height, width, in, out] or [in, out], torch's [out, in, height, width] or [out, in].
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
    """Raise UserError unless data of `shape` are images [H, W, 1 or 3]."""
    if len(shape) != 3 or shape[-1] not in (1, 3):
        raise UserError(
            f"the extractor {extractor} takes gray or colour images, but an example of this data has "
            f"shape {list(shape)}: choose --extractor classifier"
        )


def to_colour_squares(images: jax.Array, side: int, *, smooth: bool) -> jax.Array:
    """Images [B, H, W, 1 or 3] -> [B, side, side, 3]: gray repeated three times, resized bilinearly.

    smooth: whether to antialias images that shrink, so that every pixel counts.
    """
    images = jnp.broadcast_to(images, (*images.shape[:-1], 3))
    shape = (len(images), side, side, 3)
    if images.shape == shape:
        return images
    return jax.image.resize(images, shape, "bilinear", antialias=smooth)


def _check_layout(
    path: epath.Path, tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]
) -> None:
    advice = "give a weights file of the network that the extractor names"
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
                f"{path} holds {name!r:.80} of shape {tensor.shape}, which this network lacks: {advice}"
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
