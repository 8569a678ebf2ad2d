"""The components of a diffusers folder on disk: config.json and safetensors, never pickles."""

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from guided_distill.errors import UserError
from guided_distill.formats.json_files import read_json, write_json
from guided_distill.formats.safetensors_file import read_safetensors
from guided_distill.formats.torch_layout import Tensors, canonical, to_tree
from guided_distill.models.registry import Params
from guided_distill.models.weights import weight_shapes
from guided_distill.storage import storage_error, whole

DIFFUSERS_VERSION = "0.42.1"
"""The version in configs that are written here: pipelines change configs of much older versions."""

MODEL_INDEX = "model_index.json"
SCHEDULER_CONFIG = "scheduler_config.json"
DENOISERS = ("unet", "transformer")
"""Folders of a pipeline's denoiser; a pipeline has one of them."""

CLASS_EMBEDDER = "class_embedder"
"""The folder of a class-conditional U-Net's label embedding, which no pipeline of diffusers has."""

WEIGHTS = "diffusion_pytorch_model"
TEXT_WEIGHTS = "model"
"""Stems of weights files: those of diffusers' models, and those of transformers' text encoders."""

_VARIANTS = ("", "fp16", "bf16")
"""Variants of the weights, by the mark in their files' names; the first one that exists is read."""

_VARIANT = re.compile(r"\.(fp16|bf16)(?=[.-])")
_WEIGHTS_FILE = re.compile(r"[^.]+\.safetensors(\.index\.json)?")
_SHARD = re.compile(r".*-\d+-of-\d+\.safetensors")

_COPIED = (".json", ".txt")
"""Suffixes of files that are copied beside weights: nothing executable."""

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def read_model_index(folder: epath.Path) -> dict[str, Any]:
    """The model_index.json of a pipeline's folder. Raises UserError if the folder has none."""
    if not folder.is_dir():
        raise UserError(f"--from is {folder}, which is neither a folder nor a file: check the path")
    if not (folder / MODEL_INDEX).is_file():
        raise UserError(
            f"{folder} is not a diffusers model, because it has no {MODEL_INDEX}: give the folder that "
            f"pipeline.save_pretrained wrote, or a single .safetensors file"
        )
    return read_json(folder / MODEL_INDEX)


def read_weights_file(
    path: epath.Path, wanted: Callable[[str], bool] = bool
) -> dict[str, np.ndarray]:
    """Like `read_safetensors`. Raises UserError also for a pickle, which is never read."""
    if path.suffix in _PICKLES:
        raise _pickled(path)
    return read_safetensors(path, wanted)


def weights_files(folder: epath.Path) -> dict[str, epath.Path]:
    """The files of a component's weights, by their names without the mark of a variant.

    If there are several variants, they are those of the first one of `_VARIANTS`.
    """
    variants: dict[str, dict[str, epath.Path]] = {variant: {} for variant in _VARIANTS}
    for path in folder.glob("*.safetensors*"):
        mark = _VARIANT.search(path.name)
        name = plain_name(path.name)
        if _WEIGHTS_FILE.fullmatch(name):
            variants[mark[1] if mark else ""][name] = path
    for files in variants.values():
        # Shards without their index are the remains of an incomplete copy.
        if any(not _SHARD.fullmatch(name) for name in files):
            return files
    return {}


def plain_name(name: str) -> str:
    """A file's name without the mark of a variant, in the place of diffusers or of transformers."""
    return _VARIANT.sub("", name)


def read_weights(folder: epath.Path, stem: str) -> dict[str, np.ndarray]:
    """The tensors of a component, from one file or from all shards of an index.

    stem: WEIGHTS or TEXT_WEIGHTS. Raises UserError if there is no safetensors file.
    """
    files = weights_files(folder)
    if path := files.get(f"{stem}.safetensors"):
        return read_weights_file(path)
    if index := files.get(f"{stem}.safetensors.index.json"):
        return _read_shards(index)
    pickles = sorted(path for path in folder.glob("*") if path.suffix in _PICKLES)
    if pickles:
        raise _pickled(pickles[0])
    raise UserError(
        f"{folder} has no weights: {stem}.safetensors is missing, so get the complete folder"
    )


def read_component(
    network: nn.Module, example: jax.ShapeDtypeStruct, folder: epath.Path, stem: str
) -> Params:
    """A component's weights as the params of `network`, which takes arrays like `example`.

    stem: WEIGHTS or TEXT_WEIGHTS. Raises UserError unless names and shapes are those of the network.
    """
    template = weight_shapes(
        lambda: network.init(jax.random.key(0), jnp.zeros(example.shape, example.dtype))["params"],
        folder / "config.json",
    )
    return to_tree(canonical(read_weights(folder, stem)), template, source=folder)


def _read_shards(index: epath.Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(_weight_map(index).values())):
        path = index.parent / name
        if path.parent != index.parent or not path.is_file():
            raise UserError(
                f"{index} names a shard {name} that is missing: get the complete folder"
            )
        shard = read_weights_file(path)
        if twice := sorted(shard.keys() & tensors.keys()):
            raise UserError(
                f"{path} holds {twice[0]}, which another shard also holds: get the folder again"
            )
        tensors |= shard
    return tensors


def _weight_map(index: epath.Path) -> dict[str, str]:
    """The shard of each tensor."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(each, str) for each in where.values()):
        raise UserError(f"{index}: weight_map must name a file for each tensor: get the file again")
    return where


def write_component(
    folder: epath.Path, config: Mapping[str, Any], tensors: Tensors, stem: str
) -> None:
    """Write config.json and the weights, each complete or not at all. Raises UserError on failure."""
    write_json(folder / "config.json", config)
    path = folder / f"{stem}.safetensors"
    try:
        with whole(path) as part:
            part.touch()
            mode = os.stat(part).st_mode
            safetensors.numpy.save_file(dict(tensors), part, metadata={"format": "pt"})
            # The library ignores the umask and lets only the owner read the file.
            os.chmod(part, mode)
    except (OSError, safetensors.SafetensorError) as error:
        raise storage_error(path, error) from error


@dataclass(frozen=True)
class _Copied:
    """A file and its copy's name, relative to the copied folder."""

    path: epath.Path
    name: str


def copy_folder(source: epath.Path, target: epath.Path, *, leave_out: Collection[str] = ()) -> None:
    """Copy a model's JSON, text and safetensors files, byte for byte.

    leave_out: names of top-level entries to leave out. Weights lose the mark of their variant in the
    copy, because `from_pretrained` looks for names without one. Nothing else is copied: no pickles,
    programs or hidden files. Raises UserError if copying fails, and, before anything is written, for a
    link out of `source`.
    """
    files = files_to_copy(source, leave_out=leave_out)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for each in files:
            copy = target / each.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if copy.name.endswith(".index.json"):
                _copy_index(each.path, copy)
            else:
                each.path.copy(copy, overwrite=True)
    except OSError as error:
        raise storage_error(target, error) from error


def files_to_copy(source: epath.Path, *, leave_out: Collection[str] = ()) -> list[_Copied]:
    """The files that `copy_folder` copies. Raises UserError for a link out of `source`."""
    files = [each for each in _files(source, "") if each.name.partition("/")[0] not in leave_out]
    for each in files:
        _check_link(each.path, source)
    return files


def _files(folder: epath.Path, prefix: str) -> Iterator[_Copied]:
    for name, path in weights_files(folder).items():
        yield _Copied(path, prefix + name)
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        elif path.suffix in _COPIED and ".safetensors.index." not in path.name:
            yield _Copied(path, prefix + path.name)


def _check_link(path: epath.Path, source: epath.Path) -> None:
    """Raises UserError for a link out of `source`, unless it is one of a hub's cache.

    A hub's cache keeps its files as links into the folder `blobs` of the same repository.
    """
    found = epath.Path(os.path.realpath(path))
    if found.is_relative_to(os.path.realpath(source)):
        return
    snapshots = found.parent.parent / "snapshots"
    if found.parent.name == "blobs" and epath.Path(os.path.abspath(path)).is_relative_to(snapshots):
        return
    raise UserError(f"{path} is a link out of {source}: replace it by the file itself")


def _copy_index(source: epath.Path, target: epath.Path) -> None:
    """Copy an index byte for byte, unless it names shards of a variant."""
    where = _weight_map(source)
    named = {tensor: plain_name(name) for tensor, name in where.items()}
    if named == where:
        source.copy(target, overwrite=True)
    else:
        write_json(target, {**read_json(source), "weight_map": named})


def _pickled(path: epath.Path) -> UserError:
    return UserError(
        f"{path} is a pickle, which can run any code and is never read: load the model in diffusers "
        f"(from_pretrained, or from_single_file for one file) and save it again by "
        f"pipeline.save_pretrained('FOLDER', safe_serialization=True)"
    )
