"""Imports a published model as a teacher: `guided-distill import`."""

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
from etils import epath

from guided_distill.config import Data, Experiment, Model, Teacher
from guided_distill.errors import UserError
from guided_distill.formats.companions import COMPANIONS
from guided_distill.formats.diffusers_autoencoder import read_autoencoder
from guided_distill.formats.diffusers_configs import (
    DenoiserSettings,
    SchedulerSettings,
    read_denoiser,
    read_scheduler,
)
from guided_distill.formats.diffusers_folder import (
    CLASS_EMBEDDER,
    DENOISERS,
    MODEL_INDEX,
    SCHEDULER_CONFIG,
    WEIGHTS,
    copy_folder,
    files_to_copy,
    read_model_index,
    read_weights,
    weights_files,
)
from guided_distill.formats.hub import HUB, download
from guided_distill.formats.json_files import read_json, write_json
from guided_distill.formats.safetensors_file import read_metadata
from guided_distill.formats.single_file import read_single_file, write_folder
from guided_distill.formats.torch_layout import Tensors, canonical, to_tree
from guided_distill.models.weights import weight_shapes
from guided_distill.places import path_named
from guided_distill.runs.files import write_stages
from guided_distill.runs.folder import claim
from guided_distill.runs.model_file import SUFFIX, is_own
from guided_distill.runs.trained import Description, package_version
from guided_distill.text.registry import load_text_encoder
from guided_distill.text.tokenizers import clip_tokenizer
from guided_distill.training.checkpoints import StageCheckpoints

log = logging.getLogger(__name__)

IMPORTED_STEPS = 1
"""The number of updates that an imported teacher records, so that its stage counts as finished."""

_UNREAD = ("feature_extractor", "image_encoder", "safety_checker")
"""Components of a pipeline that neither training nor sampling uses."""


@dataclass(frozen=True)
class SingleFile:
    """Options for importing a single file.

    prediction_type: "epsilon" or "v_prediction", None if the file states it. tokenizer: the folder of the
    model's tokenizer, None for a class-conditional model. averaged: import the U-Net's EMA weights.
    """

    prediction_type: str | None = None
    tokenizer: epath.Path | None = None
    averaged: bool = False


@dataclass(frozen=True)
class _Model:
    """A denoiser, read and checked. condition_shapes: shapes of one example's condition, by name."""

    denoiser: DenoiserSettings
    chain: SchedulerSettings
    tensors: Tensors
    class_names: tuple[str, ...]
    condition_shapes: Mapping[str, tuple[int, ...]]


def import_model(
    source: str, workdir: epath.Path, *, single: SingleFile | None = None
) -> list[epath.Path]:
    """Import a model as the teacher of the run `workdir`, and its autoencoder etc. as its companions.

    source: a diffusers folder, a single .safetensors file, or hub:ID or hub:ID@REVISION for a folder to
    download. Returns the folders written, teacher and companions. Nothing is written before the complete
    model has been read. Raises UserError if the model isn't supported, or if workdir already holds a run.
    """
    if (workdir / "config.json").exists():
        raise UserError(f"{workdir} already holds a run: choose another --workdir")
    for name in ("teacher", COMPANIONS):
        if (workdir / name).exists():
            raise UserError(
                f"{workdir / name} exists without a config.json, probably from an interrupted import: "
                f"remove it, or choose another --workdir"
            )
    with _as_folder(source, single or SingleFile()) as (folder, name):
        index = read_model_index(folder)
        model = _read_model(folder, index)
        about = _describe(model, name=name)
        network = about.network()
        template = weight_shapes(lambda: network.init(jax.random.key(0)), folder)
        params = to_tree(model.tensors, template, source=folder)
        kept = _checked_companions(folder, index)
        with StageCheckpoints(workdir / "teacher", keep=1) as checkpoints:
            checkpoints.save_result(IMPORTED_STEPS, params, about=about.to_json())
            checkpoints.wait()
        copy_folder(folder, workdir / COMPANIONS, leave_out=_left_out(folder, kept))
        part = _denoiser_part(index, folder)
        write_json(
            workdir / COMPANIONS / part / "config.json", read_json(folder / part / "config.json")
        )
        if kept != index:
            write_json(workdir / COMPANIONS / MODEL_INDEX, kept)
        write_stages(workdir, {"teacher": IMPORTED_STEPS})
        # This comes last, because it makes the folder a run.
        claim(workdir, about.experiment)
    return [workdir / "teacher", workdir / COMPANIONS]


@contextlib.contextmanager
def _as_folder(source: str, single: SingleFile) -> Iterator[tuple[epath.Path, str]]:
    """Yields the source as a diffusers folder, temporary for a single file, and the model's name."""
    is_file = not source.startswith(HUB) and path_named(source).is_file()
    for field in dataclasses.fields(single):
        if getattr(single, field.name) != field.default and not is_file:
            raise UserError(
                f"--{field.name} is for a single file, but {source} is a folder: leave out "
                f"--{field.name}"
            )
    if source.startswith(HUB):
        folder = download(source.removeprefix(HUB))
        repository, _, _ = source.partition("@")
        with _named(folder, source):
            yield folder, f"{repository}@{folder.name}"
    elif not is_file:
        yield path_named(source), path_named(source).name or source
    else:
        with _unpacked(source, single) as folder:
            yield folder, path_named(source).name


@contextlib.contextmanager
def _unpacked(source: str, single: SingleFile) -> Iterator[epath.Path]:
    """Yields a single file as a temporary folder; errors name the file instead of the folder."""
    if single.prediction_type not in (None, "epsilon", "v_prediction"):
        raise UserError(
            f"--prediction_type is {single.prediction_type!r}; choose epsilon or v_prediction"
        )
    path = path_named(source)
    if path.suffix == SUFFIX and is_own(read_metadata(path)):
        raise UserError(
            f"--from {source} is one of this program's own models: sample it or start from it as it is, "
            f"or make a run of it by `guided-distill export --workdir {source} --out FOLDER`"
        )
    checkpoint = read_single_file(
        path, prediction_type=single.prediction_type, averaged=single.averaged
    )
    if checkpoint.text_encoder:
        if single.tokenizer is None or not single.tokenizer.is_dir():
            raise UserError(
                f"{source} holds no tokenizer: add --tokenizer with the tokenizer's folder, such as "
                f"`tokenizer` in a diffusers folder of the same model"
            )
        clip_tokenizer(single.tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        write_folder(checkpoint, epath.Path(scratch), single.tokenizer)
        del checkpoint
        with _named(scratch, source):
            yield epath.Path(scratch)


@contextlib.contextmanager
def _named(folder: epath.Path | str, source: str) -> Iterator[None]:
    """Name the source in errors of the block in place of the folder that was made from it."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(folder), source)) from error


def _read_model(folder: epath.Path, index: Mapping[str, Any]) -> _Model:
    part = folder / _denoiser_part(index, folder)
    scheduler = folder / "scheduler" / SCHEDULER_CONFIG
    denoiser = read_denoiser(read_json(part / "config.json"), part / "config.json")
    chain = read_scheduler(read_json(scheduler), scheduler)
    tensors = canonical(read_weights(part, WEIGHTS))
    if denoiser.num_classes:
        class_names = _class_names(index, denoiser.num_classes, folder / MODEL_INDEX)
        return _Model(denoiser, chain, tensors, class_names, {"label": ()})
    if (folder / CLASS_EMBEDDER).is_dir():
        table = read_weights(folder / CLASS_EMBEDDER, WEIGHTS).get("embedding.weight")
        if table is None:
            raise UserError(
                f"{folder / CLASS_EMBEDDER} lacks the tensor embedding.weight: get the complete folder"
            )
        tensors = {**tensors, "class_embedder.weight": table}
        class_names = tuple(map(str, range(len(table) - 1)))
        denoiser = replace(denoiser, num_classes=len(class_names))
        return _Model(denoiser, chain, tensors, class_names, {"label": ()})
    shapes: dict[str, tuple[int, ...]] = {"text": load_text_encoder(f"companions:{folder}").shape}
    if denoiser.inpaint:
        height, width, channels = denoiser.data_shape
        shapes["inpaint"] = (height, width, 1 + channels)
    return _Model(denoiser, chain, tensors, (), shapes)


def _denoiser_part(index: Mapping[str, Any], folder: epath.Path) -> str:
    for name in DENOISERS:
        if _in_use(index, name):
            return name
    raise UserError(
        f"{folder / MODEL_INDEX} names neither a unet nor a transformer, so "
        f"{index.get('_class_name')} can't be imported: give a pipeline that has one"
    )


def _class_names(index: Mapping[str, Any], count: int, where: epath.Path) -> tuple[str, ...]:
    names = index.get("id2label") or {}
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{where}: id2label must be an object with a string for each number")
    return tuple(names.get(str(i), str(i)) for i in range(count))


def _describe(model: _Model, *, name: str) -> Description:
    experiment = Experiment(
        data=Data(name=name),
        model=Model(
            name=model.denoiser.name,
            parameterization=model.chain.parameterization,
            schedule=model.chain.schedule,
            schedule_options=dict(model.chain.schedule_options),
            options=dict(model.denoiser.options),
        ),
        teacher=Teacher(steps=IMPORTED_STEPS),
    )
    return Description(
        stage="teacher",
        total_steps=IMPORTED_STEPS,
        num_steps=None,
        sampler=None,
        w_min=None,
        w_max=None,
        data_shape=model.denoiser.data_shape,
        class_names=model.class_names,
        teacher=None,
        package_version=package_version(),
        experiment=experiment,
        condition_shapes=model.condition_shapes,
        latent=True,
    )


def _checked_companions(folder: epath.Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """The companions' model_index.json: the source's, without unused components that can't be loaded.

    Raises UserError unless the other components exist and can be copied and the autoencoder is supported.
    """
    kept = dict(index)
    for name in index:
        if not _in_use(index, name):
            continue
        if name in _UNREAD and not _can_be_loaded(folder / name):
            log.warning("%s is left out: %s has no safetensors file of it", name, folder)
            kept[name] = [None, None]
        elif not (folder / name).is_dir():
            raise UserError(
                f"{folder / MODEL_INDEX} names {name}, which is missing: get the complete folder"
            )
    files_to_copy(folder, leave_out=_left_out(folder, kept))
    read_autoencoder(folder / "vae")
    return kept


def _can_be_loaded(part: epath.Path) -> bool:
    """Whether the folder of an unused component exists, with weights if it should have any."""
    return part.is_dir() and (part.name == "feature_extractor" or bool(weights_files(part)))


def _left_out(folder: epath.Path, index: Mapping[str, Any]) -> list[str]:
    return [
        path.name
        for path in folder.iterdir()
        if path.name != MODEL_INDEX and (path.name in DENOISERS or not _in_use(index, path.name))
    ]


def _in_use(index: Mapping[str, Any], name: str) -> bool:
    """Whether model_index.json has a component of that name; [null, null] stands for none."""
    entry = index.get(name)
    return isinstance(entry, list) and len(entry) == 2 and None not in entry
