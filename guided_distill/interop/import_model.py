"""A published model as a teacher of ours: `guided-distill import`."""

import contextlib
import importlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
from etils import epath

from guided_distill.config import Data, Experiment, Model, Teacher
from guided_distill.errors import UserError
from guided_distill.interop.single_file import read_single_file, write_folder
from guided_distill.layouts.companions import COMPANIONS, read_autoencoder
from guided_distill.layouts.diffusers_configs import (
    Chain,
    Denoiser,
    read_denoiser,
    read_scheduler,
)
from guided_distill.layouts.diffusers_folder import (
    CLASS_EMBEDDER,
    MODEL_INDEX,
    SCHEDULER_CONFIG,
    WEIGHTS,
    copy_folder,
    read_json,
    read_model_index,
    read_weights,
)
from guided_distill.layouts.torch_layout import Tensors, canonical, to_tree
from guided_distill.pipeline import claim
from guided_distill.text.registry import load_text_encoder
from guided_distill.training.checkpoints import StageCheckpoints
from guided_distill.training.trained import Description, package_version

HUB = "hub:"
DENOISERS = ("unet", "transformer")
IMPORTED_STEPS = 1
"""How many updates an imported teacher counts: as many as make a stage that is finished."""

# What a pipeline needs; a hub's repository often holds the same weights several times.
_HUB_FILES = (MODEL_INDEX, "*/*.json", "*/*.txt", "*/*.safetensors")
_HUB_COPIES = ("*fp16*", "*non_ema*", "*openvino*", "*flax*")


@dataclass(frozen=True)
class _Model:
    """A denoiser, read and checked. condition_shapes: of one example's condition, by name."""

    denoiser: Denoiser
    chain: Chain
    tensors: Tensors
    class_names: tuple[str, ...]
    condition_shapes: Mapping[str, tuple[int, ...]]


def import_model(
    source: str,
    workdir: epath.Path,
    *,
    prediction_type: str | None = None,
    tokenizer: epath.Path | None = None,
) -> list[epath.Path]:
    """Write a teacher, W/teacher, and its companions, W/companions; answer both folders.

    source: a diffusers folder, a single .safetensors file, or hub:ID for one that is fetched.
    prediction_type, tokenizer: what a single file may not tell and doesn't hold. Nothing is written
    unless everything was read. Raises UserError for what is not a supported model.
    """
    if (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds a run already: choose another --workdir")
    for name in ("teacher", COMPANIONS):
        if (workdir / name).exists():
            raise UserError(
                f"{workdir / name} is there without a config.json, as if an import had been cut: remove "
                f"it, or choose another --workdir"
            )
    with _as_folder(source, prediction_type, tokenizer) as folder:
        index = read_model_index(folder)
        model = _read_model(folder, index)
        about = _describe(model, name=epath.Path(source).name or source)
        template = jax.eval_shape(about.network().init, jax.random.key(0))
        params = to_tree(model.tensors, template, source=folder)
        _check_companions(folder, index)
        with StageCheckpoints(workdir / "teacher", keep=1) as checkpoints:
            checkpoints.save_result(IMPORTED_STEPS, params, about=about.to_json())
            checkpoints.wait()
        _copy_companions(folder, index, workdir / COMPANIONS)
        # Last of all, for it makes the folder a run.
        claim(workdir, about.experiment)
    return [workdir / "teacher", workdir / COMPANIONS]


@contextlib.contextmanager
def _as_folder(
    source: str, prediction_type: str | None, tokenizer: epath.Path | None
) -> Iterator[epath.Path]:
    """The diffusers folder that a source is, or is turned into for the time being."""
    is_file = not source.startswith(HUB) and epath.Path(source).is_file()
    for flag, value in (("--prediction_type", prediction_type), ("--tokenizer", tokenizer)):
        if value is not None and not is_file:
            raise UserError(f"{flag} is for a single file, and {source} is a folder: leave it out")
    if source.startswith(HUB):
        yield _fetched(source.removeprefix(HUB))
    elif not is_file:
        yield epath.Path(source)
    else:
        if prediction_type not in (None, "epsilon", "v_prediction"):
            raise UserError(
                f"--prediction_type is {prediction_type!r}; choose epsilon or v_prediction"
            )
        checkpoint = read_single_file(epath.Path(source), prediction_type=prediction_type)
        if checkpoint.text_encoder and (tokenizer is None or not tokenizer.is_dir()):
            raise UserError(
                f"{source} holds no tokenizer: add --tokenizer and the folder of one, such as "
                f"`tokenizer` in a diffusers folder of the same model"
            )
        with tempfile.TemporaryDirectory() as scratch:
            write_folder(checkpoint, epath.Path(scratch), tokenizer)
            del checkpoint
            yield epath.Path(scratch)


def _fetched(name: str) -> epath.Path:
    """The folder of a hub's repository, fetched unless it is in the cache already."""
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError:
        raise UserError(
            f"--from {HUB}{name} needs the package huggingface_hub: pip install it "
            f"(the extra `hub`), or give the path of a folder"
        ) from None
    try:
        return epath.Path(
            hub.snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_COPIES)
        )
    except Exception as error:  # Whatever the network or the hub says.
        words = " ".join(str(error).split())[:200]
        raise UserError(f"--from {HUB}{name} can't be fetched ({words})") from error


def _read_model(folder: epath.Path, index: Mapping[str, Any]) -> _Model:
    parts = [name for name in DENOISERS if name in index]
    if not parts:
        raise UserError(
            f"{folder / MODEL_INDEX} names neither a unet nor a transformer: {index.get('_class_name')} "
            f"is no pipeline that can be imported"
        )
    part = folder / parts[0]
    scheduler = folder / "scheduler" / SCHEDULER_CONFIG
    denoiser = read_denoiser(read_json(part / "config.json"), part / "config.json")
    chain = read_scheduler(read_json(scheduler), scheduler)
    tensors = canonical(read_weights(part, WEIGHTS))
    if denoiser.num_classes:
        names = index.get("id2label") or {}
        class_names = tuple(names.get(str(i), str(i)) for i in range(denoiser.num_classes))
        return _Model(denoiser, chain, tensors, class_names, {"label": ()})
    if (folder / CLASS_EMBEDDER).is_dir():
        table = read_weights(folder / CLASS_EMBEDDER, WEIGHTS).get("embedding.weight")
        if table is None:
            raise UserError(f"{folder / CLASS_EMBEDDER} lacks the tensor embedding.weight")
        tensors = {**tensors, "class_embedder.weight": table}
        class_names = tuple(map(str, range(len(table) - 1)))
        denoiser = replace(denoiser, num_classes=len(class_names))
        return _Model(denoiser, chain, tensors, class_names, {"label": ()})
    shapes: dict[str, tuple[int, ...]] = {"text": load_text_encoder(f"companions:{folder}").shape}
    if denoiser.inpaint:
        height, width, channels = denoiser.data_shape
        shapes["inpaint"] = (height, width, 1 + channels)
    return _Model(denoiser, chain, tensors, (), shapes)


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


def _check_companions(folder: epath.Path, index: Mapping[str, Any]) -> None:
    """Raises UserError unless all are there, and our own networks can be given their weights."""
    for name in index:
        if _in_use(index, name) and not (folder / name).is_dir():
            raise UserError(
                f"{folder / MODEL_INDEX} names {name}, which is not there: get the whole folder"
            )
    read_autoencoder(folder / "vae")


def _copy_companions(folder: epath.Path, index: Mapping[str, Any], target: epath.Path) -> None:
    others = [
        path.name
        for path in folder.iterdir()
        if path.name != MODEL_INDEX and (path.name in DENOISERS or not _in_use(index, path.name))
    ]
    copy_folder(folder, target, leave_out=others)


def _in_use(index: Mapping[str, Any], name: str) -> bool:
    """Whether model_index.json has a component of that name; it writes [null, null] for none."""
    entry = index.get(name)
    return isinstance(entry, list) and len(entry) == 2 and None not in entry
