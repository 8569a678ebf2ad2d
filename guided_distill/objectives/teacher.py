"""The teacher: one network, conditional and unconditional by dropping labels."""

import jax
import jax.numpy as jnp

from guided_distill.diffusion.guidance import Denoiser
from guided_distill.diffusion.process import Prediction, add_noise
from guided_distill.diffusion.schedules import Schedule
from guided_distill.objectives.weighting import Loss, prediction_loss


def drop_labels(label: jax.Array, key: jax.Array, *, null_label: int, rate: float) -> jax.Array:
    """Labels [B] with each replaced by the null label at probability `rate`."""
    return jnp.where(jax.random.bernoulli(key, rate, label.shape), null_label, label)


def teacher_loss(
    student: Denoiser,
    x: jax.Array,
    label: jax.Array,
    key: jax.Array,
    *,
    schedule: Schedule,
    weighting: str,
    label_dropout: float,
) -> Loss:
    """Denoise x [B, ...] with label [B] at t ~ U[0, 1] (Ho & Salimans 2022, algorithm 1).

    Raises ValueError if the student has no null label.
    """
    if student.null_label is None:
        raise ValueError("label dropout needs a denoiser with a null label")
    time_key, noise_key, label_key = jax.random.split(key, 3)
    t = jax.random.uniform(time_key, x.shape[:1])
    eps = jax.random.normal(noise_key, x.shape)
    label = drop_labels(label, label_key, null_label=student.null_label, rate=label_dropout)
    log_snr = schedule(t)
    prediction = student.predict(add_noise(x, eps, log_snr=log_snr), t, label, None)
    return prediction_loss(prediction, Prediction(x, eps), log_snr=log_snr, weighting=weighting)
