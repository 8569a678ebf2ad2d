"""Translates diffusers' configs of networks and schedulers to our settings, and back.

A key that our networks and samplers don't support is an error that names it: no key is ignored silently.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from guided_distill.errors import UserError
from guided_distill.formats.diffusers_folder import DIFFUSERS_VERSION
from guided_distill.formats.json_files import (
    a_list,
    divides,
    must,
    one_of,
    positive,
    whole_number,
    whole_numbers,
)

log = logging.getLogger(__name__)

PARAMETERIZATIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x"}
"""The prediction_type of a scheduler's config, and our name for it."""

NUM_TIMESTEPS = 1000

_SAMPLERS = (
    "DDIM",
    "DDPM",
    "DEISMultistep",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "EulerAncestralDiscrete",
    "EulerDiscrete",
    "HeunDiscrete",
    "KDPM2AncestralDiscrete",
    "KDPM2Discrete",
    "LMSDiscrete",
    "PNDM",
    "UniPCMultistep",
)

# The only supported value of a key. None and False are accepted for every key.
_SCHEDULER_MUST = {
    "num_train_timesteps": NUM_TIMESTEPS,
    "trained_betas": None,
    "thresholding": False,
    "rescale_betas_zero_snr": False,
    "timestep_type": "discrete",
}

_UNET_MUST = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
}
_UNET_DEFAULTS = {
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1280,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": None,
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "use_linear_projection": False,
}
"""diffusers' defaults for the keys that are read here."""

# Keys without effect here: they concern half precision and an embedding that our networks don't have.
_UNET_IGNORED = ("addition_embed_type_num_heads", "upcast_attention")


_DIT_MUST = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "dropout": 0.0,
    "norm_eps": 1e-5,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
}
_DIT_DEFAULTS = {
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "out_channels": None,
    "patch_size": 2,
    "sample_size": 32,
}
_DIT_NUMBERS = ("attention_head_dim", "num_attention_heads", "num_layers", "patch_size")
_DIT_IGNORED = ("norm_num_groups", "upcast_attention")


@dataclass(frozen=True)
class DenoiserSettings:
    """The settings in a denoiser's config.json. num_classes: 0 if the condition is a text.

    data_shape: [h, w, c] of the latents. inpaint: whether the network also takes a mask and the masked
    image's latents.
    """

    name: str
    options: Mapping[str, Any]
    data_shape: tuple[int, int, int]
    num_classes: int
    inpaint: bool


@dataclass(frozen=True)
class SchedulerSettings:
    """The settings in a scheduler's config: what the network predicts, and for which betas."""

    parameterization: str
    schedule: str
    schedule_options: Mapping[str, float]


def read_scheduler(config: Mapping[str, Any], where: object) -> SchedulerSettings:
    """The settings in a scheduler_config.json. Raises UserError, naming the key, if not supported.

    Keys that concern only the pipeline's sampling (steps_offset, timestep_spacing, ...) aren't read.
    clip_sample clips pixels to [-1, 1], which latents don't need: it is ignored with a warning.
    """
    name = str(config.get("_class_name"))
    if name.removesuffix("Scheduler") not in _SAMPLERS:
        raise UserError(
            f"{where}: _class_name is {name}, which isn't a supported scheduler with discrete betas; "
            f"supported are {', '.join(_SAMPLERS)}"
        )
    for key, only in _SCHEDULER_MUST.items():
        must(config.get(key, only), only, key, where)
    if config.get("clip_sample"):
        log.warning("%s: clip_sample is ignored, because latents have no range to clip to", where)
    prediction = config.get("prediction_type", "epsilon")
    one_of(prediction, PARAMETERIZATIONS, "prediction_type", where)
    schedule = config.get("beta_schedule", "linear")
    one_of(schedule, ("linear", "scaled_linear"), "beta_schedule", where)
    betas = {
        key: positive(config.get(key, default), key, where)
        for key, default in (("beta_start", 0.0001), ("beta_end", 0.02))
    }
    if not betas["beta_start"] <= betas["beta_end"] < 1:
        raise UserError(
            f"{where}: beta_start must not exceed beta_end, and both must lie between 0 and 1"
        )
    return SchedulerSettings(PARAMETERIZATIONS[prediction], schedule, betas)


def scheduler_config(chain: SchedulerSettings, *, num_steps: int | None) -> dict[str, Any]:
    """The scheduler_config.json of diffusers' scheduler for a deterministic student.

    num_steps: the student's number of steps; None for a model that takes any. The scheduler spaces its
    steps from index 999 down (trailing), and its last step leads to clean data, alpha = 1. diffusers'
    DDIM steps by 1000 // num_steps indices, so it is used only where num_steps divides 1000. Otherwise
    first-order DPM-Solver++, which is mathematically the same step, steps between the indices that it
    visits: see `visited_by_diffusers`.
    """
    (prediction,) = (
        key for key, ours in PARAMETERIZATIONS.items() if ours == chain.parameterization
    )
    shared = {
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": NUM_TIMESTEPS,
        **chain.schedule_options,
        "beta_schedule": chain.schedule,
        "trained_betas": None,
        "thresholding": False,
        "prediction_type": prediction,
        "timestep_spacing": "trailing",
        "steps_offset": 1,
        "rescale_betas_zero_snr": False,
    }
    if num_steps is None or NUM_TIMESTEPS % num_steps:
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            **shared,
            "algorithm_type": "dpmsolver++",
            "solver_order": 1,
            "final_sigmas_type": "zero",
        }
    return {
        "_class_name": "DDIMScheduler",
        **shared,
        "clip_sample": False,
        "set_alpha_to_one": True,
    }


def stochastic_scheduler_config(
    chain: SchedulerSettings, *, num_steps: int | None
) -> dict[str, Any]:
    """The scheduler_config.json for scheduling_guided_distill.py.

    num_steps: the only number of steps that it accepts; None for any.
    """
    stock = scheduler_config(chain, num_steps=num_steps)
    shared = ("_diffusers_version", "num_train_timesteps", "beta_schedule", "prediction_type")
    return {
        "_class_name": "GuidedDistillStochasticScheduler",
        **{key: stock[key] for key in shared},
        **chain.schedule_options,
        "trained_steps": num_steps,
    }


def visited_indices(num_steps: int) -> list[int]:
    """The timestep indices at which a student of num_steps steps is called, noisiest first."""
    return [round(NUM_TIMESTEPS * n / num_steps) - 1 for n in range(num_steps, 0, -1)]


def visited_by_diffusers(num_steps: int) -> list[int]:
    """The indices of diffusers' trailing spacing, which can be off by one or include one step more."""
    steps = np.arange(NUM_TIMESTEPS, 0, -NUM_TIMESTEPS / num_steps)
    return [int(step) - 1 for step in steps.round()]


def ignored_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a denoiser's config.json that have no effect here, with their values."""
    return {key: config[key] for key in (*_UNET_IGNORED, *_DIT_IGNORED) if key in config}


def read_denoiser(config: Mapping[str, Any], where: object) -> DenoiserSettings:
    """The settings in the config.json of a U-Net or DiT. Raises UserError, naming an unsupported key."""
    readers = {
        "UNet2DConditionModel": _read_unet,
        "DiTTransformer2DModel": _read_dit,
        "Transformer2DModel": _read_dit,
    }
    name = str(config.get("_class_name"))
    one_of(name, readers, "_class_name", where)
    return readers[name](config, where)


def _read_unet(config: Mapping[str, Any], where: object) -> DenoiserSettings:
    if config.get("time_cond_proj_dim") is not None:
        raise UserError(
            f"{where}: time_cond_proj_dim is set, so this U-Net is already conditioned on a guidance "
            f"weight: import the model that it was distilled from"
        )
    read = _read_keys(config, _UNET_MUST, _UNET_DEFAULTS, _UNET_IGNORED, where)
    widths = whole_numbers(read["block_out_channels"], "block_out_channels", where)
    levels = len(widths)
    attends = _attending(read["down_block_types"], "down_block_types", "Down", where)
    ascending = _attending(read["up_block_types"], "up_block_types", "Up", where)
    if len(attends) != levels or ascending != attends[::-1]:
        raise UserError(
            f"{where}: up_block_types must be down_block_types in reverse, with one entry for each of "
            f"block_out_channels"
        )
    heads = read["attention_head_dim"]
    heads = whole_numbers(
        heads if isinstance(heads, list | tuple) else [heads] * levels, "attention_head_dim", where
    )
    numbers = {
        key: whole_number(read[key], key, where)
        for key in ("layers_per_block", "cross_attention_dim", "norm_num_groups")
    }
    channels = whole_number(read["out_channels"], "out_channels", where)
    if read["in_channels"] not in (channels, 2 * channels + 1):
        raise UserError(
            f"{where}: in_channels is {read['in_channels']}, and with {channels} out_channels must be "
            f"{channels}, or {2 * channels + 1} for in-painting"
        )
    if len(heads) != levels:
        raise UserError(
            f"{where}: attention_head_dim needs one number for each of block_out_channels"
        )
    # The middle block always has attention.
    for width, count, attending in zip(widths, heads, [*attends[:-1], True], strict=True):
        divides(numbers["norm_num_groups"], width, "norm_num_groups", "block_out_channels", where)
        if attending:
            divides(count, width, "attention_head_dim", "block_out_channels", where)
    size = _sample_size(config, where)
    return DenoiserSettings(
        name="sd_unet",
        options={
            "block_out_channels": widths,
            "cross_attention_levels": tuple(level for level in range(levels) if attends[level]),
            # diffusers calls it attention_head_dim by mistake, and its configs keep that name.
            "num_attention_heads": heads,
            "use_linear_projection": bool(read["use_linear_projection"]),
            **numbers,
        },
        data_shape=(size, size, channels),
        num_classes=0,
        inpaint=read["in_channels"] != channels,
    )


def unet_config(denoiser: DenoiserSettings, *, w_embedding_width: int | None) -> dict[str, Any]:
    """The config.json of a U-Net; `read_denoiser` inverts it. w_embedding_width: None without w."""
    options = denoiser.options
    size, _, channels = denoiser.data_shape
    attends = [
        level in options["cross_attention_levels"]
        for level in range(len(options["block_out_channels"]))
    ]
    kinds = {True: "CrossAttn", False: ""}
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        **{key: value for key, value in _UNET_MUST.items() if value is not None},
        "sample_size": size,
        "in_channels": 2 * channels + 1 if denoiser.inpaint else channels,
        "out_channels": channels,
        "block_out_channels": list(options["block_out_channels"]),
        "down_block_types": [f"{kinds[each]}DownBlock2D" for each in attends],
        "up_block_types": [f"{kinds[each]}UpBlock2D" for each in reversed(attends)],
        "attention_head_dim": list(options["num_attention_heads"]),
        "layers_per_block": options["layers_per_block"],
        "cross_attention_dim": options["cross_attention_dim"],
        "norm_num_groups": options["norm_num_groups"],
        "use_linear_projection": options["use_linear_projection"],
        "time_cond_proj_dim": w_embedding_width,
    }


def _sample_size(config: Mapping[str, Any], where: object) -> int:
    """Latents per side. Like pipelines, raises a smaller one to 64 in configs older than version 0.9."""
    size = whole_number(config.get("sample_size"), "sample_size", where)
    version = re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version", "")))
    old = version is not None and (int(version[1]), int(version[2])) < (0, 9)
    return max(size, 64) if old else size


def _attending(types: Any, key: str, way: str, where: object) -> list[bool]:
    kinds = {f"CrossAttn{way}Block2D": True, f"{way}Block2D": False}
    for each in a_list(types, key, where):
        one_of(each, kinds, key, where)
    return [kinds[each] for each in types]


def _read_dit(config: Mapping[str, Any], where: object) -> DenoiserSettings:
    read = _read_keys(config, _DIT_MUST, _DIT_DEFAULTS, _DIT_IGNORED, where)
    channels = whole_number(read["in_channels"], "in_channels", where)
    numbers = {key: whole_number(read[key], key, where) for key in _DIT_NUMBERS}
    size = whole_number(read["sample_size"], "sample_size", where)
    divides(numbers["patch_size"], size, "patch_size", "sample_size", where)
    if read["out_channels"] not in (None, channels, 2 * channels):
        raise UserError(
            f"{where}: out_channels is {read['out_channels']}, and must be in_channels or twice that"
        )
    return DenoiserSettings(
        name="dit",
        options={**numbers, "learned_sigma": read["out_channels"] == 2 * channels},
        data_shape=(size, size, channels),
        num_classes=whole_number(read["num_embeds_ada_norm"], "num_embeds_ada_norm", where),
        inpaint=False,
    )


def dit_config(denoiser: DenoiserSettings) -> dict[str, Any]:
    """The config.json of a DiT that doesn't take w; `read_denoiser` inverts it."""
    size, _, channels = denoiser.data_shape
    options = denoiser.options
    return {
        "_class_name": "DiTTransformer2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        **{key: value for key, value in _DIT_MUST.items() if key != "attention_type"},
        **{key: options[key] for key in _DIT_NUMBERS},
        "sample_size": size,
        "in_channels": channels,
        "out_channels": 2 * channels if options["learned_sigma"] else channels,
        "num_embeds_ada_norm": denoiser.num_classes,
    }


def _read_keys(
    config: Mapping[str, Any],
    only: Mapping[str, Any],
    defaults: Mapping[str, Any],
    ignored: tuple[str, ...],
    where: object,
) -> dict[str, Any]:
    """The values of the keys of `defaults`.

    Raises UserError unless every other key is ignored, has its only supported value, or is off.
    """
    for key, value in config.items():
        if key.startswith("_") or key in defaults or key in ignored:
            continue
        if key in only:
            must(value, only[key], key, where)
        elif value is not None and value is not False:
            raise UserError(
                f"{where}: {key} is {value!r}, which isn't supported: it must be null or false"
            )
    return {key: config.get(key, default) for key, default in defaults.items()}
