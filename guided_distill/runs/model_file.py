"""A trained model in one safetensors file: its weights, and its description as metadata.

A tensor's name is its path in the tree of weights, joined by dots. The metadata are `about`, the item of
that name in a checkpoint as JSON, and `sha256`, the digest of this text and of the tensors.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from guided_distill.errors import UserError
from guided_distill.formats.safetensors_file import read_metadata, read_safetensors
from guided_distill.formats.torch_layout import Tensors, check_tensors
from guided_distill.models.registry import Params
from guided_distill.storage import is_there, write_bytes

SUFFIX = ".safetensors"
DTYPES = ("float32", "float16")
ABOUT, DIGEST = "about", "sha256"


def is_model_file(path: epath.Path) -> bool:
    """Whether a path names a model's file instead of the folder of a run or a stage."""
    return path.suffix == SUFFIX and not path.is_dir()


def is_own(metadata: Mapping[str, Any]) -> bool:
    """Whether these metadata are of a file that `write_model_file` wrote."""
    return all(isinstance(metadata.get(name), str) for name in (ABOUT, DIGEST))


@dataclass(frozen=True)
class ModelFile:
    """A model's file, with the reading methods of `StageCheckpoints`."""

    path: epath.Path

    def about(self) -> dict[str, Any]:
        """The description. Raises UserError if the file is missing, damaged or of another program."""
        text, _ = self._metadata()
        try:
            about = json.loads(text)
        except (ValueError, RecursionError):
            about = None
        if not isinstance(about, dict):
            raise UserError(f"{self.path} holds no description in JSON: get the file again")
        return about

    def restore_result(self, template: Params) -> tuple[int, Params]:
        """The step and the weights, in the shapes, types and shardings of `template`.

        Raises UserError as `about`, and if the weights are of another network, not finite, or damaged.
        """
        text, digest = self._metadata()
        tensors = read_safetensors(self.path)
        places = flatten_dict(template, sep=".")
        check_tensors(
            tensors,
            {name: leaf.shape for name, leaf in places.items()},
            source=self.path,
            described_by="this description",
        )
        if _digest(text, tensors) != digest:
            raise UserError(
                f"{self.path} is damaged, because its digest differs: get the file again"
            )
        for name, tensor in tensors.items():
            if not np.isfinite(tensor).all():
                raise UserError(f"{self.path} holds non-finite numbers in {name}: get another file")
        params = {name: _placed(tensors[name], leaf) for name, leaf in places.items()}
        return self.about()["total_steps"], unflatten_dict(params, sep=".")

    def _metadata(self) -> tuple[str, str]:
        """The description's text, and the digest."""
        if not is_there(self.path):
            raise UserError(f"{self.path} doesn't exist: give a stage's folder or a model's file")
        metadata = read_metadata(self.path)
        if not is_own(metadata):
            raise UserError(
                f"{self.path} was not written by `guided-distill export --format safetensors`: if it "
                f"is one of Stable Diffusion, `guided-distill import` makes a run of it"
            )
        return metadata[ABOUT], metadata[DIGEST]


def write_model_file(
    path: epath.Path, params: Params, *, about: Mapping[str, Any], dtype: str
) -> None:
    """Write weights, in one of DTYPES, and their description; the file is complete or missing.

    Raises UserError if a weight exceeds float16's 65504, or the file can't be written.
    """
    tensors = {
        name: _converted(name, np.asarray(leaf), dtype)
        for name, leaf in flatten_dict(params, sep=".").items()
    }
    text = json.dumps(about)
    metadata = {ABOUT: text, DIGEST: _digest(text, tensors)}
    write_bytes(path, safetensors.numpy.save(tensors, metadata))


def _converted(name: str, weights: np.ndarray, dtype: str) -> np.ndarray:
    largest = np.finfo(dtype).max
    if np.abs(weights).max(initial=0.0) > largest:
        raise UserError(f"{name} holds weights above {dtype}'s {largest:g}: add --dtype float32")
    return np.ascontiguousarray(weights, dtype)


def _placed(tensor: np.ndarray, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    whole = np.asarray(tensor, leaf.dtype)
    return jax.make_array_from_callback(whole.shape, leaf.sharding, lambda part: whole[part])


def _digest(text: str, tensors: Tensors) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()
