"""Converts weights between torch's names and layouts and our parameter trees, exactly.

The path of a leaf gives its tensor's name. An entry of a torch list carries its index behind an
underscore: `down_blocks_0/resnets_1/conv1/kernel` is `down_blocks.0.resnets.1.conv1.weight`. A
convolution's kernel is HWIO here and OIHW in torch, and a matrix is [in, out] here and [out, in] in
torch; all other weights have the same layout.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from guided_distill.errors import UserError
from guided_distill.formats.safetensors_file import is_floating

Tensors = Mapping[str, np.ndarray]

# Names such as linear_1 and proj_out_2 are torch's own: they aren't entries of a list.
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

# The axes that transpose a kernel with so many dimensions to torch's layout, and back.
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
"""The most tensors that an error names."""


def torch_name(path: tuple[str, ...]) -> str:
    """The tensor's name for a path of our tree. Raises KeyError for a leaf that isn't in `_LEAVES`."""
    return ".".join([*(_ENTRY.sub(r"\1.\2", part) for part in path[:-1]), _LEAVES[path[-1]]])


def to_tensors(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tree's weights by torch's names, in torch's layout, each array contiguous."""
    return {
        torch_name(path): np.ascontiguousarray(_turned(path, np.asarray(leaf), _TO_TORCH))
        for path, leaf in flatten_dict(tree).items()
    }


def torch_shapes(template: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The name and shape in torch of every weight of a tree, whose leaves need only a shape."""
    return {
        torch_name(path): _torch_shape(path, leaf.shape)
        for path, leaf in flatten_dict(template).items()
    }


def to_tree(tensors: Tensors, template: Mapping[str, Any], *, source: object) -> dict[str, Any]:
    """The tensors as a tree like `template`, whose leaves need only a shape; inverts `to_tensors`.

    Half precision is converted to float32, exactly. Raises UserError, naming `source` and up to LISTED
    tensors, unless names and shapes are those of the template and all tensors are floating-point.
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
    """Raises UserError unless the tensors are floating-point, with exactly the needed names and shapes.

    The error names `source` and up to LISTED tensors. needed: shapes by name. described_by: where the
    names and shapes come from, in words.
    """
    faults = {
        "lacks": [name for name in needed if name not in tensors],
        "holds what the network has no place for:": [
            name for name in tensors if name not in needed
        ],
        "has the wrong shape in": [
            f"{name} ({_size(tensors[name].shape)}, not {_size(shape)})"
            for name, shape in needed.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    found = [f"{fault} {_listed(names)}" for fault, names in faults.items() if names]
    if found:
        raise UserError(
            f"{source} {'; '.join(found)}: the weights don't belong to {described_by}, or the file is "
            f"incomplete"
        )
    for name in needed:
        if not is_floating(tensors[name].dtype):
            raise UserError(
                f"{source} holds {name} as {tensors[name].dtype}, and only floating-point weights can be "
                f"read: get the model as it was before it was quantized"
            )


def canonical(tensors: Tensors) -> dict[str, np.ndarray]:
    """The tensors of an autoencoder or a text encoder, with the names of older files brought up to date.

    In older files, the autoencoder's attention has 1x1 convolutions named query, key, value and
    proj_attn; the text encoder's names begin with `text_model.`, and its position_ids, a range, are
    stored.
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
