"""Weights between torch's names and layouts and our parameter trees: one rule each way, exact.

A path of our tree names its tensor. Entries of torch's lists carry their index behind an underscore,
`down_blocks_0/resnets_1/conv1/kernel` being `down_blocks.0.resnets.1.conv1.weight`, and the leaf says how
the numbers lie: a convolution's kernel is HWIO here and OIHW there, a matrix [in, out] here and
[out, in] there, all else is the same.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from guided_distill.errors import UserError
from guided_distill.formats.safetensors_file import is_floating

Tensors = Mapping[str, np.ndarray]

# linear_1 and proj_out_2 are names of torch's own, and no entries of a list.
_LISTS = (
    "attentions",
    "down_blocks",
    "downsamplers",
    "layers",
    "net",
    "resnets",
    "to_out",
    "transformer_blocks",
    "up_blocks",
    "upsamplers",
)
_ENTRY = re.compile(rf"^({'|'.join(_LISTS)})_(\d+)$")

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}

# Transposing by these takes a kernel of so many axes to torch, and back.
_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}
_FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}

_LEGACY_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
_LEGACY_NAME = re.compile(
    rf"^(.*\battentions\.\d+)\.({'|'.join(_LEGACY_ATTENTION)})\.(weight|bias)$"
)

LISTED = 10
"""How many tensors an error names."""


def torch_name(path: tuple[str, ...]) -> str:
    """The tensor's name for a path of our tree. Raises KeyError for a leaf that torch has no word for."""
    return ".".join([*(_ENTRY.sub(r"\1.\2", part) for part in path[:-1]), _LEAVES[path[-1]]])


def to_tensors(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tree's weights as torch keeps them, each array contiguous."""
    return {
        torch_name(path): np.ascontiguousarray(_turned(path, np.asarray(leaf), _TO_TORCH))
        for path, leaf in flatten_dict(tree).items()
    }


def torch_shapes(template: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape in torch of every weight of a tree, whose leaves need only a shape."""
    return {
        torch_name(path): _torch_shape(path, leaf.shape)
        for path, leaf in flatten_dict(template).items()
    }


def to_tree(tensors: Tensors, template: Mapping[str, Any], *, source: object) -> dict[str, Any]:
    """`tensors` as the tree `template`, whose leaves need only a shape; the inverse of `to_tensors`.

    Lower precision becomes float32, exactly. Raises UserError, naming `source` and up to ten tensors,
    unless every tensor has a place of its shape, every place has its tensor, and all are floating-point.
    """
    check_tensors(tensors, torch_shapes(template), source=source, described_by="this config.json")
    return unflatten_dict(
        {
            path: np.ascontiguousarray(
                _turned(path, np.asarray(tensors[torch_name(path)], np.float32), _FROM_TORCH)
            )
            for path in flatten_dict(template)
        }
    )


def check_tensors(
    tensors: Tensors, needed: Mapping[str, tuple[int, ...]], *, source: object, described_by: str
) -> None:
    """Raises UserError, naming `source` and up to ten tensors, unless these are those that are needed.

    needed: the shape of each, by name. described_by: what says so. All must be floating-point.
    """
    faults = {
        "lacks": [name for name in needed if name not in tensors],
        "has no place for": [name for name in tensors if name not in needed],
        "has the wrong shape in": [
            f"{name} ({_size(tensors[name].shape)}, not {_size(shape)})"
            for name, shape in needed.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    said = [f"{what} {_listed(names)}" for what, names in faults.items() if names]
    if said:
        raise UserError(
            f"{source} {'; '.join(said)}: the weights don't belong to {described_by}, or the file is "
            f"not whole".replace("has no place for", "holds what the network has no place for:")
        )
    for name in needed:
        if not is_floating(tensors[name].dtype):
            raise UserError(
                f"{source} holds {name} as {tensors[name].dtype}, and weights are read from "
                f"floating-point numbers alone: get the model as it was before it was quantized"
            )


def canonical(tensors: Tensors) -> dict[str, np.ndarray]:
    """Today's names for those of older files of autoencoders and text encoders.

    The autoencoder's attention was made of 1x1 convolutions named query, key, value and proj_attn; the
    text encoder's names began with `text_model.`, and its position_ids, a plain range, were kept.
    """
    today = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("text_model.")
        if name.endswith(".position_ids"):
            continue
        if legacy := _LEGACY_NAME.match(name):
            block, layer, leaf = legacy.groups()
            name = f"{block}.{_LEGACY_ATTENTION[layer]}.{leaf}"
            if tensor.shape[2:] == (1, 1):
                tensor = tensor[:, :, 0, 0]
        today[name] = tensor
    return today


def _turned(
    path: tuple[str, ...], array: np.ndarray, axes: Mapping[int, tuple[int, ...]]
) -> np.ndarray:
    return array.transpose(axes[array.ndim]) if path[-1] == "kernel" else array


def _torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _TO_TORCH[len(shape)]) if path[-1] == "kernel" else shape


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{', '.join(names[:LISTED])}{more}"
