"""Components of a diffusers folder, as they lie on disk: config.json and safetensors, nothing pickled."""

import json
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from guided_distill.errors import UserError
from guided_distill.layouts.safetensors_file import read_safetensors
from guided_distill.layouts.torch_layout import Tensors
from guided_distill.storage import storage_error, whole, write_text

DIFFUSERS_VERSION = "0.42.1"
"""What written configs call themselves: pipelines mend the configs of much older versions."""

MODEL_INDEX = "model_index.json"
SCHEDULER_CONFIG = "scheduler_config.json"
CLASS_EMBEDDER = "class_embedder"
"""Folder of a class-conditional U-Net's table of labels, which no pipeline of diffusers has."""

WEIGHTS = "diffusion_pytorch_model"
TEXT_WEIGHTS = "model"
"""What weights files are called: of diffusers' models, and of transformers' text encoders."""

_VARIANTS = ("", ".fp16", ".bf16")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON file's object. Raises UserError if it is missing or isn't one."""
    if not path.is_file():
        raise UserError(f"{path} is missing: give a folder that diffusers' save_pretrained wrote")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): is the file whole?") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, and should hold an object")
    return values


def write_json(path: epath.Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file as diffusers writes its own."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_model_index(folder: epath.Path) -> dict[str, Any]:
    """What a pipeline's folder is made of. Raises UserError if it isn't one."""
    if not folder.is_dir():
        raise UserError(f"--from is {folder}, which is neither a folder nor a file: check the path")
    if not (folder / MODEL_INDEX).is_file():
        raise UserError(
            f"{folder} is not a diffusers model, for it has no {MODEL_INDEX}: give the folder that "
            f"pipeline.save_pretrained wrote, or a single .safetensors file"
        )
    return read_json(folder / MODEL_INDEX)


def read_tensors(path: epath.Path, wanted: Callable[[str], bool] = bool) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file whose names are `wanted`.

    Raises UserError if the file is a pickle, which is never read, or is damaged.
    """
    if path.suffix in _PICKLES:
        raise _pickled(path)
    return read_safetensors(path, wanted)


def read_weights(folder: epath.Path, stem: str) -> dict[str, np.ndarray]:
    """The tensors of a component: of one file, of all shards of an index, or of a half-precision variant.

    stem: WEIGHTS or TEXT_WEIGHTS. Raises UserError if there are none in safetensors.
    """
    for variant in _VARIANTS:
        if (path := folder / f"{stem}{variant}.safetensors").is_file():
            return read_tensors(path)
        # diffusers puts the variant at the end; its older versions, and transformers, do not.
        for end in (f".safetensors.index{variant}.json", f"{variant}.safetensors.index.json"):
            name = f"{stem}{end}"
            if (path := folder / name).is_file():
                return _read_shards(path)
    pickles = sorted(path for path in folder.glob("*") if path.suffix in _PICKLES)
    if pickles:
        raise _pickled(pickles[0])
    raise UserError(
        f"{folder} has no weights: {stem}.safetensors is missing, so get the whole folder"
    )


def _read_shards(index: epath.Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    where = read_json(index).get("weight_map", {})
    for name in sorted(set(where.values())):
        path = index.parent / name
        if path.parent != index.parent or not path.is_file():
            raise UserError(f"{index} names a shard {name} that is not there: get the whole folder")
        shard = read_tensors(path)
        if twice := sorted(shard.keys() & tensors.keys()):
            raise UserError(f"{path} holds {twice[0]}, which another shard holds too: get it again")
        tensors |= shard
    return tensors


def write_component(
    folder: epath.Path, config: Mapping[str, Any], tensors: Tensors, stem: str
) -> None:
    """Write config.json and the weights, whole or not at all. Raises UserError if that fails."""
    write_json(folder / "config.json", config)
    path = folder / f"{stem}.safetensors"
    try:
        with whole(path) as part:
            safetensors.numpy.save_file(dict(tensors), part, metadata={"format": "pt"})
            # It would be the writer's alone, and a model is there to be given away.
            os.chmod(part, 0o644)
    except (OSError, safetensors.SafetensorError) as error:
        raise storage_error(path, error) from error


def copy_folder(source: epath.Path, target: epath.Path, *, leave_out: Collection[str] = ()) -> None:
    """Copy every file below `source`, byte for byte, but for top entries named in `leave_out`.

    Raises UserError if that fails.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if path.name in leave_out:
                continue
            if path.is_dir():
                copy_folder(path, target / path.name)
            else:
                path.copy(target / path.name, overwrite=True)
    except OSError as error:
        raise storage_error(target, error) from error


def _pickled(path: epath.Path) -> UserError:
    return UserError(
        f"{path} is a pickle, which could run any code and is never read: load the model in diffusers "
        f"(from_pretrained, or from_single_file for one file) and save it again by "
        f"pipeline.save_pretrained('FOLDER', safe_serialization=True)"
    )
