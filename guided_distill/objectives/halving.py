"""Stage two: a student of N steps learns, in one step, what its teacher does in two.

Meng et al. 2023: deterministic and stochastic students, and encoders; Salimans & Ho 2022, algorithm 2.
On the grid i/N the student learns one DDIM jump from t to s, for i in 1..N:

    ddim         t = i/N        s = t - 1/N    the teacher's two steps go over t - 1/(2N)
    stochastic   t = i/N        s = t - 2/N    the teacher's two steps go over t - 1/N; this is the jump
                                               of its own sampler, which then adds noise back over 1/N
    encode       t = (i-1)/N    s = t + 1/N    ddim run from data to noise, over t + 1/(2N)

A jump that ends at t = 0 has the teacher's second x as its target, for samplers return x there. The
stochastic student's jump from t = 1/N is to 0 and takes the teacher one step, hence its first x; at
N = 1 that is the only jump, so the stochastic student of one step is its teacher, and isn't trained.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from guided_distill import draws
from guided_distill.diffusion.guidance import Condition, Denoiser, with_clipping
from guided_distill.diffusion.process import (
    Prediction,
    add_noise,
    ddim_step,
    two_steps_in_one,
)
from guided_distill.diffusion.samplers import ENCODE
from guided_distill.diffusion.schedules import Schedule, arrival
from guided_distill.objectives.guidance import sample_weights
from guided_distill.objectives.weighting import Loss, prediction_loss


class Jump(NamedTuple):
    """Times [B] of a jump: where it starts, the teacher's stop half way, and where it ends."""

    t: jax.Array
    half: jax.Array
    end: jax.Array


JUMPS: dict[str, Callable[[jax.Array, int | jax.Array], Jump]] = {
    "ddim": lambda i, n: Jump(i / n, (i - 0.5) / n, (i - 1) / n),
    "stochastic": lambda i, n: Jump(i / n, (i - 1) / n, jnp.maximum(i - 2, 0) / n),
    ENCODE: lambda i, n: Jump((i - 1) / n, (i - 0.5) / n, i / n),
}
"""f(i [B] in 1..N, N) -> the student's i-th jump, by the sampler that it is trained for."""


def is_its_teacher(sampler: str, num_steps: int) -> bool:
    """Whether the only jump of a student is one of its teacher's own, so that it has nothing to learn."""
    return sampler == "stochastic" and num_steps == 1


def halving_target(
    teacher: Denoiser,
    z: jax.Array,
    condition: Condition,
    w: jax.Array | None,
    *,
    jump: Jump,
    schedule: Schedule,
) -> Prediction:
    """What the student must predict at z [B, ...] to make the teacher's two DDIM steps in one: (6)."""
    log_snr_h = arrival(schedule, jump.half)
    first = teacher.predict(z, jump.t, condition, w)
    second = teacher.predict(ddim_step(first, log_snr_h), jump.half, condition, w)
    return two_steps_in_one(
        first,
        second,
        log_snr_t=schedule(jump.t),
        log_snr_h=log_snr_h,
        log_snr_s=arrival(schedule, jump.end),
    )


def halving_loss(
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
    num_steps: int | jax.Array,
    sampler: str,
    clipped: bool = False,
) -> Loss:
    """Match two steps of the teacher in one, from a jump drawn uniformly at w ~ U[w_min, w_max].

    x is [B, ...], condition [B, ...] each; num_steps is the student's N, traced or not, so that one
    compilation may serve every round; sampler is a key of JUMPS. clipped: the teacher's two steps clip x,
    as its sampler does, and the error is that of `prediction_loss`; it plays no part in encoding, which
    never clips. Without guidance in either (the paper's two-student baseline) w plays no part. Raises
    ValueError if one of them takes w and the other doesn't: guidance belongs to stage one alone.
    """
    if student.guided != teacher.guided:
        raise ValueError(
            "step halving needs a w-conditioned teacher for a w-conditioned student: run the "
            "guidance stage first"
        )
    # At t = 0 x is z, and a pixel at the end of the range would count as met whatever its eps.
    clipped = clipped and sampler != ENCODE
    if clipped:
        teacher = with_clipping(teacher, schedule)
    index_key, noise_key, weight_key = jax.random.split(key, 3)
    i = draws.integers(index_key, x.shape[:1], 1, num_steps + 1)
    jump = JUMPS[sampler](i.astype(jnp.float32), num_steps)
    w = None
    if student.guided:
        w = sample_weights(weight_key, len(x), w_min=w_min, w_max=w_max)
    log_snr = schedule(jump.t)
    z = add_noise(x, draws.normal(noise_key, x.shape), log_snr=log_snr)
    target = jax.lax.stop_gradient(
        halving_target(teacher, z, condition, w, jump=jump, schedule=schedule)
    )
    prediction = student.predict(z, jump.t, condition, w)
    return prediction_loss(
        prediction, target, log_snr=log_snr, weighting=weighting, clipped=clipped
    )
