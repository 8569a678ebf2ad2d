"""Exports one stage of a run as a diffusers folder: `guided-distill export --format diffusers`."""

import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from guided_distill.diffusion.guidance import guidance_scale
from guided_distill.diffusion.samplers import ENCODE
from guided_distill.errors import UserError
from guided_distill.formats.card import evidence_of, write_card
from guided_distill.formats.companions import COMPANIONS
from guided_distill.formats.diffusers_configs import (
    PARAMETERIZATIONS,
    DenoiserSettings,
    SchedulerSettings,
    dit_config,
    ignored_keys,
    read_scheduler,
    scheduler_config,
    stochastic_scheduler_config,
    unet_config,
    visited_by_diffusers,
    visited_indices,
)
from guided_distill.formats.diffusers_folder import (
    CLASS_EMBEDDER,
    DENOISERS,
    MODEL_INDEX,
    SCHEDULER_CONFIG,
    WEIGHTS,
    copy_folder,
    weights_files,
    write_component,
)
from guided_distill.formats.exporting import load_one_stage, new_folder
from guided_distill.formats.json_files import read_json, write_json
from guided_distill.formats.safetensors_file import is_floating, read_dtypes
from guided_distill.formats.torch_layout import to_tensors
from guided_distill.places import local_path_named
from guided_distill.runs.folder import folder_of
from guided_distill.runs.trained import Description, Trained
from guided_distill.storage import write_bytes

STOCHASTIC_SCHEDULER = "scheduling_guided_distill"
_LABELS = "class_embedder."


def export_diffusers(
    workdir: epath.Path,
    out: epath.Path,
    *,
    stages: Sequence[str] | None = None,
    repository: str | None = None,
) -> list[epath.Path]:
    """Write one finished stage to the new folder `out`, with the run's companions and a model card.

    stages: the folder of the stage; None for the last finished one. repository: the one on a hub that the
    folder is for, from which its card loads it. Returns `out` in a list. Raises UserError for a model
    that no pipeline of diffusers can load, see `check_exportable`, and as `load_one_stage`.
    """
    local_path_named(str(out), "diffusers folders")
    companions = _companions(folder_of(workdir))
    trained = load_one_stage(workdir, out, stages)
    about = trained.description
    check_exportable(about, trained.name)
    with new_folder(out) as folder:
        index = _write(trained, companions, folder)
        _write_card(trained, folder, index, repository)
    return [out]


def _write(trained: Trained, companions: epath.Path, out: epath.Path) -> dict[str, Any]:
    """Write everything but the card, and return model_index.json."""
    about = trained.description
    copy_folder(companions, out, leave_out=(MODEL_INDEX, *DENOISERS))
    _load_in_float32(out / "text_encoder")
    index = read_json(companions / MODEL_INDEX)
    _write_denoiser(trained, companions, out, index)
    if about.sampler == "stochastic":
        _write_stochastic_scheduler(about, out, index)
    elif about.stage != "teacher" or _teachers_scheduler(companions) != _scheduler_settings(about):
        config = scheduler_config(_scheduler_settings(about), num_steps=about.num_steps)
        write_json(out / "scheduler" / SCHEDULER_CONFIG, config)
        index["scheduler"] = ["diffusers", config["_class_name"]]
    if about.w_min is not None:
        inpaint = "inpaint" in about.condition_shapes
        index["_class_name"] = f"StableDiffusion{'Inpaint' if inpaint else ''}Pipeline"
    write_json(out / MODEL_INDEX, index)
    return index


def check_exportable(about: Description, stage: str) -> None:
    """Raises UserError for a model that diffusers can't represent. stage: its folder's name."""
    model = about.model
    if model.name not in ("sd_unet", "dit"):
        raise UserError(
            f"config.model.name is {model.name}, but diffusers has only sd_unet and dit: use --format "
            f"checkpoint"
        )
    if model.name == "dit" and about.w_min is not None:
        raise UserError(
            f"{stage} is a DiT conditioned on the guidance weight, which diffusers doesn't have: use "
            f"--format checkpoint"
        )
    embedding = about.experiment.guidance.w_embedding
    if about.w_min is not None and embedding != "fourier":
        raise UserError(
            f"config.guidance.w_embedding is {embedding}, but the U-Net of diffusers takes a Fourier "
            f"embedding of the guidance weight: use --format checkpoint"
        )
    if about.sampler == ENCODE:
        raise UserError(
            f"{stage} encodes images to noise, which no pipeline of diffusers does: name a stage with "
            f"another sampler by --stages"
        )
    if model.parameterization not in PARAMETERIZATIONS.values():
        raise UserError(
            f"config.model.parameterization is {model.parameterization}, but diffusers has only "
            f"{', '.join(PARAMETERIZATIONS.values())}: use --format checkpoint"
        )
    if model.schedule not in ("linear", "scaled_linear"):
        raise UserError(
            f"config.model.schedule is {model.schedule}, but diffusers has only linear and "
            f"scaled_linear: use --format checkpoint"
        )


def _companions(workdir: epath.Path) -> epath.Path:
    if (workdir / COMPANIONS / MODEL_INDEX).is_file():
        return workdir / COMPANIONS
    raise UserError(
        f"{workdir / COMPANIONS} is missing, which holds the autoencoder and the text encoder: put a "
        f"diffusers folder of the teacher there, without its unet"
    )


def _teachers_scheduler(companions: epath.Path) -> SchedulerSettings:
    path = companions / "scheduler" / SCHEDULER_CONFIG
    return read_scheduler(read_json(path), path)


def _scheduler_settings(about: Description) -> SchedulerSettings:
    model = about.model
    return SchedulerSettings(model.parameterization, model.schedule, model.schedule_options)


def _denoiser_settings(about: Description) -> DenoiserSettings:
    """The settings of the stage's network, defaults included."""
    height, width, channels = about.data_shape
    module = about.network().module
    options = {name: getattr(module, name) for name in module.__dataclass_fields__}
    return DenoiserSettings(
        name=about.model.name,
        options=options,
        data_shape=(height, width, channels),
        num_classes=len(about.class_names),
        inpaint="inpaint" in about.condition_shapes,
    )


def _write_stochastic_scheduler(about: Description, out: epath.Path, index: dict[str, Any]) -> None:
    """diffusers has no such scheduler, so the folder includes the code, which pipelines can load."""
    script = importlib.resources.files("guided_distill.formats") / f"{STOCHASTIC_SCHEDULER}.py"
    write_bytes(out / "scheduler" / f"{STOCHASTIC_SCHEDULER}.py", script.read_bytes())
    config = stochastic_scheduler_config(_scheduler_settings(about), num_steps=about.num_steps)
    write_json(out / "scheduler" / SCHEDULER_CONFIG, config)
    index["scheduler"] = [STOCHASTIC_SCHEDULER, config["_class_name"]]


def _load_in_float32(text_encoder: epath.Path) -> None:
    """Set the text encoder's dtype to float32, like the denoiser's; transformers uses the files' one."""
    files = [each for name, each in weights_files(text_encoder).items() if name.endswith("tensors")]
    dtypes = {dtype for path in files for dtype in read_dtypes(path)}
    if any(is_floating(dtype) and dtype.itemsize < 4 for dtype in dtypes):
        config = read_json(text_encoder / "config.json")
        config.pop("torch_dtype", None)  # The key's older name.
        write_json(text_encoder / "config.json", {**config, "dtype": "float32"})


def _kept_keys(companions: epath.Path, part: str) -> dict[str, Any]:
    """The keys of the teacher's config that have no effect here but may have one in diffusers."""
    path = companions / part / "config.json"
    return ignored_keys(read_json(path)) if path.exists() else {}


def _write_denoiser(
    trained: Trained, companions: epath.Path, out: epath.Path, index: dict[str, Any]
) -> None:
    denoiser = _denoiser_settings(trained.description)
    tensors = to_tensors(jax.device_get(trained.params))
    if denoiser.name == "dit":
        index["transformer"] = ["diffusers", "DiTTransformer2DModel"]
        config = _kept_keys(companions, "transformer") | dit_config(denoiser)
        write_component(out / "transformer", config, tensors, WEIGHTS)
        return
    labels = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_LABELS)}
    if labels:
        table = {f"embedding.{name.removeprefix(_LABELS)}": each for name, each in labels.items()}
        write_component(out / CLASS_EMBEDDER, {"_class_name": "ClassEmbedder"}, table, WEIGHTS)
    takes_w = trained.description.w_min is not None
    config = _kept_keys(companions, "unet") | unet_config(
        denoiser, w_embedding_width=denoiser.options["w_embedding_width"] if takes_w else None
    )
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    write_component(out / "unet", config, tensors, WEIGHTS)


def _write_card(
    trained: Trained, out: epath.Path, index: Mapping[str, Any], repository: str | None
) -> None:
    about, vae = trained.description, read_json(out / "vae" / "config.json")
    scales = None
    if about.w_min is not None and about.w_max is not None:
        scales = (guidance_scale(about.w_min), guidance_scale(about.w_max))
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    write_card(
        out,
        "model_card",
        evidence_of([epath.Path(trained.path)]),
        about=about,
        repository=repository,
        pipeline=index["_class_name"],
        scheduler=index["scheduler"][1],
        scaling_factor=vae.get("scaling_factor", 0.18215),
        scales=scales,
        inpaint="inpaint" in about.condition_shapes,
        of_text="text" in about.condition_shapes,
        size=[factor * side for side in about.data_shape[:2]],
        shown_steps=about.num_steps or 8,
        own_timesteps=_own_timesteps(about),
        stochastic_file=f"scheduler/{STOCHASTIC_SCHEDULER}.py",
    )


def _own_timesteps(about: Description) -> list[int] | None:
    """The indices to pass instead of a number of steps; None if diffusers visits the same ones."""
    if about.num_steps is None or about.sampler == "stochastic":
        return None
    indices = visited_indices(about.num_steps)
    return None if indices == visited_by_diffusers(about.num_steps) else indices
