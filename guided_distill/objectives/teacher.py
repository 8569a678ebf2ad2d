"""The teacher: one network, conditional and unconditional by dropping conditions."""

import jax
import jax.numpy as jnp

from guided_distill import draws
from guided_distill.diffusion.guidance import Condition, Denoiser, without_condition
from guided_distill.diffusion.process import Prediction, add_noise, broadcast_to_rank
from guided_distill.diffusion.schedules import Schedule
from guided_distill.objectives.weighting import Loss, prediction_loss


def drop_conditions(
    condition: Condition, key: jax.Array, *, null: Condition, rate: float
) -> Condition:
    """The condition [B, ...] with each example's replaced by `null` at probability `rate`."""
    nothing = without_condition(condition, null)
    count = len(next(iter(nothing.values())))
    dropped = draws.bernoulli(key, rate, (count,))
    return {
        name: jnp.where(broadcast_to_rank(dropped, nothing[name]), nothing[name], value)
        for name, value in condition.items()
    }


def teacher_loss(
    student: Denoiser,
    x: jax.Array,
    condition: Condition,
    key: jax.Array,
    *,
    schedule: Schedule,
    weighting: str,
    condition_dropout: float,
) -> Loss:
    """Denoise x [B, ...] with its condition at t ~ U[0, 1] (Ho & Salimans 2022, algorithm 1).

    Raises ValueError if the student has no null condition.
    """
    if student.null is None:
        raise ValueError("dropping conditions needs a denoiser with a null condition")
    time_key, noise_key, drop_key = jax.random.split(key, 3)
    t = draws.uniform(time_key, x.shape[:1])
    eps = draws.normal(noise_key, x.shape)
    condition = drop_conditions(condition, drop_key, null=student.null, rate=condition_dropout)
    log_snr = schedule(t)
    prediction = student.predict(add_noise(x, eps, log_snr=log_snr), t, condition, None)
    return prediction_loss(prediction, Prediction(x, eps), log_snr=log_snr, weighting=weighting)
