"""The scheduler of a single file: its noise levels, and what its U-Net predicts."""

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
"""Tensors that mark a network that predicts v, and a last noise level without signal."""

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
"""Tensors that CompVis' models store beside their networks; all of them follow from the betas."""

_TYPES = {"epsilon": "epsilon", "v": "v_prediction"}
"""Prediction types by their names in a file's metadata, as diffusers names them."""

# The largest relative rounding error of half precision, that of bfloat16.
_TOLERANCE = 5e-3


@dataclass(frozen=True)
class NoiseInFile:
    """What the file `path` holds about its noise: the tensors of BUFFERS and MARKERS, and the metadata.

    betas: the first and last beta of its kind of model. needs_type: whether that kind can predict either
    epsilon or v.
    """

    path: epath.Path
    buffers: Tensors
    metadata: Mapping[str, Any]
    betas: tuple[float, float]
    needs_type: bool


def scheduler_of(noise: NoiseInFile, given: str | None) -> dict[str, Any]:
    """The scheduler_config.json. given: the user's prediction type, None if not given.

    Raises UserError if the file contradicts its kind of model or the user, and if neither gives a
    prediction type that is needed.
    """
    if "ztsnr" in noise.buffers:
        raise UserError(
            f"{noise.path} is marked ztsnr, so its last noise level has no signal, which isn't "
            f"supported: import a model with a nonzero terminal SNR"
        )
    prediction_type = _prediction_type(noise, given)
    _check_betas(noise)
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


def _prediction_type(noise: NoiseInFile, given: str | None) -> str:
    stored = _TYPES.get(str(noise.metadata.get("modelspec.prediction_type")))
    if "v_pred" in noise.buffers:
        stored = "v_prediction"
    if given and stored and given != stored:
        raise UserError(
            f"{noise.path} has the prediction type {stored}, but --prediction_type is {given}: "
            f"leave out --prediction_type"
        )
    if not given and not stored and noise.needs_type:
        raise UserError(
            f"{noise.path} is a Stable Diffusion 2, which predicts epsilon (the base models) or v, and "
            f"the file doesn't state which: add --prediction_type epsilon or --prediction_type "
            f"v_prediction"
        )
    return given or stored or "epsilon"


def _check_betas(noise: NoiseInFile) -> None:
    start, end = noise.betas
    betas = np.linspace(start**0.5, end**0.5, NUM_TIMESTEPS) ** 2
    for name, expected in (("betas", betas), ("alphas_cumprod", np.cumprod(1 - betas))):
        found = noise.buffers.get(name)
        if found is not None and (
            found.shape != expected.shape
            or not np.allclose(found.astype(np.float64), expected, rtol=_TOLERANCE, atol=0)
        ):
            raise UserError(
                f"{noise.path} has {name} that differ from those of its kind of model: convert it to a "
                f"diffusers folder with the scheduler_config.json that it needs"
            )
