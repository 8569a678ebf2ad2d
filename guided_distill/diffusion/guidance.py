"""Classifier-free guidance: the only place that applies it and converts between its conventions.

The paper's weight w (equation (7) of process.py): x_w = (1 + w) x(z, c) - w x(z). w = 0 is the plain
conditional model, w = -1 the unconditional one. Imagen, Stable Diffusion and diffusers use
guidance_scale = 1 + w.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from guided_distill.diffusion.process import Prediction, broadcast_to_rank, clip_x
from guided_distill.diffusion.schedules import Schedule

Condition = Mapping[str, Any]
"""The conditioning of examples, arrays by name: "label" (int) or "text" (float), and possibly others."""


@dataclass(frozen=True)
class Denoiser:
    """A function that predicts (x, eps) from noisy data, and how it handles guidance.

    predict(z [B, ...], t [B] in [0, 1], condition [B, ...] each, w [B] or None) -> Prediction.
    guided: whether predict already returns guided predictions for the weight w.
    null: the null condition of one example, for unconditional predictions; entries that it lacks keep
    their values. None if there is no null condition.
    """

    predict: Callable[[jax.Array, jax.Array, Condition, jax.Array | None], Prediction]
    guided: bool
    null: Condition | None


def guidance_scale(w: float) -> float:
    """Return the guidance_scale of Stable Diffusion and diffusers for the paper's weight w."""
    return 1.0 + w


def weight_from_guidance_scale(scale: float) -> float:
    """Return the paper's weight w for a guidance_scale of Stable Diffusion and diffusers."""
    return scale - 1.0


def combine(conditional: jax.Array, unconditional: jax.Array, *, w: jax.Array) -> jax.Array:
    """Equation (7), which is the same for x, eps and v: arrays [B, ...], with w [B]."""
    w = broadcast_to_rank(w, conditional)
    return (1.0 + w) * conditional - w * unconditional


def without_condition(condition: Condition, null: Condition) -> Condition:
    """Return `condition` [B, ...] with the entries of `null`, the null condition of one example."""
    nothing = {
        name: jnp.broadcast_to(jnp.asarray(value), jnp.shape(condition[name]))
        for name, value in null.items()
    }
    return {**condition, **nothing}


def with_guidance(denoiser: Denoiser) -> Denoiser:
    """Return the guided denoiser of a conditional one, which runs both branches as one batch of 2B.

    Raises ValueError if the denoiser is already guided (guidance would compound) or has no null
    condition.
    """
    if denoiser.guided:
        raise ValueError(
            "guidance is already inside a w-conditioned model: sample it at w directly"
        )
    null = denoiser.null
    if null is None:
        raise ValueError(
            "guidance needs a denoiser with a null condition for its unconditional branch"
        )

    def predict(
        z: jax.Array, t: jax.Array, condition: Condition, w: jax.Array | None
    ) -> Prediction:
        if w is None:
            raise ValueError("a guided prediction needs a weight w")
        nothing = without_condition(condition, null)
        both = denoiser.predict(
            _in_turn(z, z),
            _in_turn(t, t),
            {name: _in_turn(jnp.asarray(condition[name]), nothing[name]) for name in condition},
            None,
        )
        return Prediction(*(combine(branch[0::2], branch[1::2], w=w) for branch in both))

    return Denoiser(predict, guided=True, null=None)


def _in_turn(one: jax.Array, other: jax.Array) -> jax.Array:
    """Interleave two batches [B, ...] to [2B, ...], so that split examples needn't change devices."""
    return jnp.stack([one, other], axis=1).reshape(-1, *one.shape[1:])


def with_clipping(denoiser: Denoiser, schedule: Schedule) -> Denoiser:
    """Return the denoiser with x clipped to [-1, 1], as samplers of images use it."""

    def predict(
        z: jax.Array, t: jax.Array, condition: Condition, w: jax.Array | None
    ) -> Prediction:
        return clip_x(denoiser.predict(z, t, condition, w), z=z, log_snr=schedule(t))

    return replace(denoiser, predict=predict)
