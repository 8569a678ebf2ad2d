"""Stage one: a single network, told w, learns the guided output of its teacher."""

import jax

from guided_distill import draws
from guided_distill.diffusion.guidance import Condition, Denoiser, with_guidance
from guided_distill.diffusion.process import add_noise
from guided_distill.diffusion.schedules import Schedule
from guided_distill.objectives.weighting import Loss, prediction_loss


def sample_weights(key: jax.Array, count: int, *, w_min: float, w_max: float) -> jax.Array:
    """Guidance weights [count] ~ U[w_min, w_max]."""
    return draws.uniform(key, (count,), minval=w_min, maxval=w_max)


def guidance_loss(
    student: Denoiser,
    teacher: Denoiser,
    x: jax.Array,
    condition: Condition,
    key: jax.Array,
    *,
    schedule: Schedule,
    weighting: str,
    w_min: float,
    w_max: float,
    clipped: bool = False,
) -> Loss:
    """Match the teacher's guided prediction at w ~ U[w_min, w_max], t ~ U[0, 1].

    x is [B, ...], condition [B, ...] each; clipped as for `prediction_loss`. Meng et al. 2023,
    stage one. Raises ValueError if the teacher is guided already.
    """
    time_key, noise_key, weight_key = jax.random.split(key, 3)
    t = draws.uniform(time_key, x.shape[:1])
    w = sample_weights(weight_key, len(x), w_min=w_min, w_max=w_max)
    log_snr = schedule(t)
    z = add_noise(x, draws.normal(noise_key, x.shape), log_snr=log_snr)
    target = jax.lax.stop_gradient(with_guidance(teacher).predict(z, t, condition, w))
    prediction = student.predict(z, t, condition, w)
    return prediction_loss(
        prediction, target, log_snr=log_snr, weighting=weighting, clipped=clipped
    )
