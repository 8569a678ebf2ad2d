"""diffusers' config.json files as our config's words, and back.

What our networks and samplers can't honour is an error that names the key: a config is never half read.
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
"""prediction_type of a scheduler's config, and what it is called here."""

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

# The one value of a key that our code has, where it has only one; None and False pass for any key.
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
"""What diffusers takes for a key that a config leaves out, of those that are read here."""

# Of no effect here: about half precision, and about an embedding that isn't there.
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
    """What a denoiser's config.json says. num_classes: 0 where the condition is a text.

    inpaint: whether the network takes a mask and the masked image's latents beside its own.
    """

    name: str
    options: Mapping[str, Any]
    data_shape: tuple[int, int, int]
    num_classes: int
    inpaint: bool


@dataclass(frozen=True)
class SchedulerSettings:
    """What a scheduler's config says of the network: what it predicts, and of which betas."""

    parameterization: str
    schedule: str
    schedule_options: Mapping[str, float]


def read_scheduler(config: Mapping[str, Any], where: object) -> SchedulerSettings:
    """The chain of a scheduler_config.json. Raises UserError, naming the key, for any other kind.

    How the pipeline sampled (steps_offset, timestep_spacing, ...) isn't part of it. clip_sample, which
    holds pixels to [-1, 1], means nothing for the latents that are imported here, and is left out with a
    warning.
    """
    name = str(config.get("_class_name"))
    if name.removesuffix("Scheduler") not in _SAMPLERS:
        raise UserError(
            f"{where}: _class_name is {name}, which isn't a sampler of a network with discrete betas: "
            f"supported are {', '.join(_SAMPLERS)}"
        )
    for key, only in _SCHEDULER_MUST.items():
        must(config.get(key, only), only, key, where)
    if config.get("clip_sample"):
        log.warning("%s: clip_sample is left out, for latents have no range to be held to", where)
    prediction = config.get("prediction_type", "epsilon")
    one_of(prediction, PARAMETERIZATIONS, "prediction_type", where)
    schedule = config.get("beta_schedule", "linear")
    one_of(schedule, ("linear", "scaled_linear"), "beta_schedule", where)
    betas = {
        key: positive(config.get(key, default), key, where)
        for key, default in (("beta_start", 0.0001), ("beta_end", 0.02))
    }
    if not betas["beta_start"] <= betas["beta_end"] < 1:
        raise UserError(f"{where}: beta_start and beta_end must rise between 0 and 1")
    return SchedulerSettings(PARAMETERIZATIONS[prediction], schedule, betas)


def scheduler_config(chain: SchedulerSettings, *, num_steps: int | None) -> dict[str, Any]:
    """The stock sampler that takes the steps of a deterministic student, num_steps of them or any.

    Trailing spacing from index 999 down, and a last step to clean data, alpha = 1. diffusers' DDIM goes
    by 1000 // num_steps, so it is the one where that is exact; elsewhere DPM-Solver++ of first order,
    the same step in other words, goes from each index that it visits to the next. `visited_by_diffusers`
    says which those are.
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
    """That of formats/scheduling_guided_distill.py. num_steps: the only number that it takes, or None."""
    stock = scheduler_config(chain, num_steps=num_steps)
    shared = ("_diffusers_version", "num_train_timesteps", "beta_schedule", "prediction_type")
    return {
        "_class_name": "GuidedDistillStochasticScheduler",
        **{key: stock[key] for key in shared},
        **chain.schedule_options,
        "trained_steps": num_steps,
    }


def visited_indices(num_steps: int) -> list[int]:
    """Indices of the chain at which a student of num_steps is called, noisiest first."""
    return [round(NUM_TIMESTEPS * n / num_steps) - 1 for n in range(num_steps, 0, -1)]


def visited_by_diffusers(num_steps: int) -> list[int]:
    """Where trailing spacing in diffusers calls it: one step more for some, or an index off by one."""
    steps = np.arange(NUM_TIMESTEPS, 0, -NUM_TIMESTEPS / num_steps)
    return [int(step) - 1 for step in steps.round()]


def ignored_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a denoiser's config.json has no effect here."""
    return {key: config[key] for key in (*_UNET_IGNORED, *_DIT_IGNORED) if key in config}


def read_denoiser(config: Mapping[str, Any], where: object) -> DenoiserSettings:
    """The network of a U-Net's or a DiT's config.json. Raises UserError, naming the key, for others."""
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
            f"{where}: time_cond_proj_dim is set, so this U-Net has guidance inside already: give the "
            f"model that it was distilled from"
        )
    read = _read_keys(config, _UNET_MUST, _UNET_DEFAULTS, _UNET_IGNORED, where)
    widths = whole_numbers(read["block_out_channels"], "block_out_channels", where)
    levels = len(widths)
    attends = _attending(read["down_block_types"], "down_block_types", "Down", where)
    ascending = _attending(read["up_block_types"], "up_block_types", "Up", where)
    if len(attends) != levels or ascending != attends[::-1]:
        raise UserError(
            f"{where}: up_block_types must be down_block_types in reverse, with one for each of "
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
            f"{where}: in_channels is {read['in_channels']}, and can be {channels}, or for in-painting "
            f"{2 * channels + 1}, with {channels} out_channels"
        )
    if len(heads) != levels:
        raise UserError(
            f"{where}: attention_head_dim needs one number for each of block_out_channels"
        )
    # The middle attends too.
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
            # diffusers' name for it is a mistake that its configs have to keep.
            "num_attention_heads": heads,
            "use_linear_projection": bool(read["use_linear_projection"]),
            **numbers,
        },
        data_shape=(size, size, channels),
        num_classes=0,
        inpaint=read["in_channels"] != channels,
    )


def unet_config(denoiser: DenoiserSettings, *, w_embedding_width: int | None) -> dict[str, Any]:
    """The config.json of a U-Net; `read_denoiser` is its inverse. w_embedding_width: None without w."""
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
    """Side of the latents. Pipelines take 64 for a smaller one in a config older than version 0.9."""
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
            f"{where}: out_channels is {read['out_channels']}, and can be in_channels or twice as many"
        )
    return DenoiserSettings(
        name="dit",
        options={**numbers, "learned_sigma": read["out_channels"] == 2 * channels},
        data_shape=(size, size, channels),
        num_classes=whole_number(read["num_embeds_ada_norm"], "num_embeds_ada_norm", where),
        inpaint=False,
    )


def dit_config(denoiser: DenoiserSettings) -> dict[str, Any]:
    """The config.json of a DiT without w; `read_denoiser` is its inverse."""
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
    """The values of `defaults`' keys. Every other key has to have its one value, or be off."""
    for key, value in config.items():
        if key.startswith("_") or key in defaults or key in ignored:
            continue
        if key in only:
            must(value, only[key], key, where)
        elif value is not None and value is not False:
            raise UserError(f"{where}: {key} is {value!r}, which isn't supported: it must be off")
    return {key: config.get(key, default) for key, default in defaults.items()}
