"""What a single file says of its noise: the chain of levels, and what the U-Net predicts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from guided_distill.errors import UserError
from guided_distill.formats.diffusers_configs import NUM_TIMESTEPS
from guided_distill.formats.diffusers_folder import DIFFUSERS_VERSION
from guided_distill.formats.torch_layout import Tensors

MARKERS = frozenset({"v_pred", "ztsnr"})
"""Tensors by which trainers say that a network predicts v, and that its last level has no signal."""

BUFFERS = frozenset(
    {
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "betas",
        "log_one_minus_alphas_cumprod",
        "logvar",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "posterior_variance",
        "scale_factor",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
    }
)
"""What CompVis' class of diffusion models keeps beside its networks, all of it made from the betas."""

_TYPES = {"epsilon": "epsilon", "v": "v_prediction"}
"""What a file's metadata calls what diffusers calls a prediction type."""

# Half precision, bfloat16 above all, rounds by up to this much.
_TOLERANCE = 5e-3


@dataclass(frozen=True)
class NoiseInFile:
    """What `path` holds: its tensors of BUFFERS and MARKERS, and its metadata.

    betas: the ends of its kind's chain. needs_type: whether its kind predicts epsilon or v.
    """

    path: epath.Path
    buffers: Tensors
    metadata: Mapping[str, Any]
    betas: tuple[float, float]
    needs_type: bool


def scheduler_of(noise: NoiseInFile, asked: str | None) -> dict[str, Any]:
    """A scheduler_config.json. asked: the prediction type that a user gave.

    Raises UserError if the file contradicts its kind or the user, or says nothing where it must.
    """
    if "ztsnr" in noise.buffers:
        raise UserError(
            f"{noise.path} is marked ztsnr: its last noise level holds no signal, which isn't supported"
        )
    prediction_type = _prediction_type(noise, asked)
    _check_chain(noise)
    start, end = noise.betas
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": NUM_TIMESTEPS,
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": prediction_type,
    }


def _prediction_type(noise: NoiseInFile, asked: str | None) -> str:
    said = _TYPES.get(str(noise.metadata.get("modelspec.prediction_type")))
    if "v_pred" in noise.buffers:
        said = "v_prediction"
    if asked and said and asked != said:
        raise UserError(
            f"{noise.path} says that its prediction type is {said}, and --prediction_type is {asked}: "
            f"leave --prediction_type out"
        )
    if not asked and not said and noise.needs_type:
        raise UserError(
            f"{noise.path} is a Stable Diffusion 2, which predicts epsilon (the base models) or v, and "
            f"the file doesn't say which: add --prediction_type epsilon or --prediction_type "
            f"v_prediction"
        )
    return asked or said or "epsilon"


def _check_chain(noise: NoiseInFile) -> None:
    start, end = noise.betas
    betas = np.linspace(start**0.5, end**0.5, NUM_TIMESTEPS) ** 2
    for name, expected in (("betas", betas), ("alphas_cumprod", np.cumprod(1 - betas))):
        found = noise.buffers.get(name)
        if found is not None and (
            found.shape != expected.shape
            or not np.allclose(found.astype(np.float64), expected, rtol=_TOLERANCE, atol=0)
        ):
            raise UserError(
                f"{noise.path} has other {name} than its kind of model: convert it to a diffusers folder "
                f"with the scheduler_config.json that it needs"
            )
