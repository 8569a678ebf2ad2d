"""Multistep consistency distillation: one teacher step, and the student's own way on from there.

Heek, Hoogeboom & Salimans 2024, arXiv:2403.06807, algorithm 1. A student of N steps divides [0, 1] into N
segments. From any t in one it learns to reach the lower end in one step, so that N steps sample:

    (1)  z_t = alpha x + sigma eps, for t on a grid of step 1/K, K a multiple of N; s = t - 1/K
    (2)  first = T(z_t, t, w), and its DDIM step to s                          the teacher
    (3)  second = sg S(z_s, s, w), whose DDIM step ends at j/N <= s            the student itself
    (4)  target: the one prediction at t whose step to j/N is both            equation (6) of process.py

If the teacher also made the step of (3), this would be step halving (`objectives/halving.py`). At s = j/N
there is no second step, and the target is `first`. The larger K is, the smaller the error of (2), but the
more updates it takes for what the student learns at j/N to reach the segment's other end: K rises
log-linearly during training. The student of N = 1 is a consistency model. The paper trains a student for
one w; here w is an input, as in all stages after the first.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp

from guided_distill import draws, kinds
from guided_distill.diffusion.guidance import Denoiser, with_clipping
from guided_distill.diffusion.process import add_noise
from guided_distill.diffusion.schedules import CHAINS, NUM_TIMESTEPS, Schedule
from guided_distill.errors import UserError
from guided_distill.models.registry import Network, Params
from guided_distill.objectives.halving import Jump, halving_target
from guided_distill.objectives.stage import (
    Batch,
    Examples,
    LossFunction,
    Optimization,
    SecondStage,
    check_one_step,
    check_stage_one,
)
from guided_distill.objectives.weighting import Loss, Weighting, prediction_loss

if TYPE_CHECKING:
    from guided_distill.config import Experiment


@dataclass(frozen=True)
class Consistency(Optimization):
    """Settings of multistep consistency distillation."""

    weighting: Weighting = "snr_plus_one"
    """The weighting of the loss over noise levels."""
    clipped: bool = False
    """Clip x to [-1, 1] in the target, as samplers of images do."""
    num_steps: tuple[kinds.NumSteps, ...] = (8, 4, 2, 1)
    """N of the students, each of which starts from stage one."""
    first_teacher_num_steps: kinds.NumSteps = 64
    """K at the first update, rounded to a multiple of N."""
    last_teacher_num_steps: kinds.NumSteps = 1280
    """K at the last update, rounded to a multiple of N; between, it rises log-linearly."""
    huber: kinds.Positive = 1e-4
    """c of the pseudo-Huber distance sqrt(e + c^2) - c, for a squared error e."""


def teacher_steps_per_segment(
    settings: Consistency, update: int | jax.Array, num_steps: int | jax.Array
) -> jax.Array:
    """K/N at an update, a whole number of at least 1: K rises log-linearly."""
    low, high = (
        math.log(each)
        for each in (settings.first_teacher_num_steps, settings.last_teacher_num_steps)
    )
    share = jnp.minimum(jnp.asarray(update) / settings.steps, 1.0)
    return jnp.maximum(jnp.round(jnp.exp(low + share * (high - low)) / num_steps), 1).astype(
        jnp.int32
    )


def jump_of(segment: jax.Array, step: jax.Array, *, steps: jax.Array, num_steps: jax.Array) -> Jump:
    """The jump from t, the step-th of the `steps` times in a segment of 0 ... N - 1, by s to its end."""
    fine = steps * num_steps
    place = segment * steps + step
    return Jump(t=place / fine, half=(place - 1) / fine, end=segment / num_steps)


def consistency_loss(
    student: Denoiser,
    teacher: Denoiser,
    examples: Examples,
    *,
    schedule: Schedule,
    settings: Consistency,
    w_range: tuple[float, float],
    grid: tuple[jax.Array, jax.Array],
) -> Loss:
    """Match target (4) at a time drawn uniformly from the grid, and at w ~ U[w_range].

    grid: (K/N, N), both possibly traced.
    """
    steps, num_steps = grid
    x, condition, keys = examples
    segment_keys, step_keys, noise_keys, weight_keys = draws.split(keys, 4)
    jump = jump_of(
        draws.integers(segment_keys, 0, num_steps),
        draws.integers(step_keys, 1, steps + 1),
        steps=steps,
        num_steps=num_steps,
    )
    w = draws.uniforms(weight_keys, *w_range)
    log_snr = schedule(jump.t)
    z = add_noise(x, draws.normals(noise_keys, x.shape[1:]), log_snr=log_snr)
    first, second = teacher, student
    if settings.clipped:
        first, second = with_clipping(teacher, schedule), with_clipping(student, schedule)
    target = jax.lax.stop_gradient(
        halving_target(first, z, condition, w, jump=jump, schedule=schedule, second=second)
    )
    prediction = student.predict(z, jump.t, condition, w)
    error = prediction_loss(
        prediction,
        target,
        log_snr=log_snr,
        weighting=settings.weighting,
        clipped=settings.clipped,
    )
    huber = jnp.sqrt(error.per_example + settings.huber**2) - settings.huber
    return Loss(huber, error.aux)


class ConsistencyStage(SecondStage):
    """The training of a student of N steps from stage one."""

    kind = "consistency"

    @classmethod
    def students(cls, experiment: "Experiment") -> list[list[Self]]:
        """A chain of one student for each N."""
        settings, w_range = experiment.consistency, experiment.guidance.w_range
        return [[cls(settings, settings.steps, w_range, n, "ddim")] for n in settings.num_steps]

    @classmethod
    def check(cls, experiment: "Experiment") -> None:
        """Raises UserError also for a run without stage one, and for an N that can't be trained."""
        super().check(experiment)
        if cls.is_used(experiment):
            _check_students(experiment)

    def loss(self, student: Network, teacher: Network) -> LossFunction:
        """`consistency_loss` of a batch."""
        assert self.w_range is not None
        w_range = self.w_range

        def loss(params: Params, frozen: Any, batch: Batch, keys: jax.Array) -> Loss:
            num_steps = frozen["num_steps"]
            return consistency_loss(
                student.denoiser(params),
                teacher.denoiser(frozen["params"]),
                Examples.of(batch, keys),
                schedule=student.schedule,
                settings=self.settings,
                w_range=w_range,
                grid=(
                    teacher_steps_per_segment(self.settings, frozen["update"], num_steps),
                    num_steps,
                ),
            )

        return loss


def _check_students(experiment: "Experiment") -> None:
    settings, model = experiment.consistency, experiment.model
    check_stage_one(experiment)
    if not settings.num_steps or len(set(settings.num_steps)) < len(settings.num_steps):
        raise UserError(
            f"config.consistency.num_steps is {settings.num_steps}: name at least one number of steps, "
            f"each once"
        )
    first, last = settings.first_teacher_num_steps, settings.last_teacher_num_steps
    if not 2 * max(settings.num_steps) <= first <= last:
        raise UserError(
            f"config.consistency.first_teacher_num_steps is {first}: make it at least twice the largest "
            f"of num_steps, {max(settings.num_steps)}, and at most last_teacher_num_steps, {last}"
        )
    if model.schedule in CHAINS and last > NUM_TIMESTEPS:
        raise UserError(
            f"config.consistency.last_teacher_num_steps is {last}, but config.model.schedule is "
            f"{model.schedule}, a chain of {NUM_TIMESTEPS}: make it smaller"
        )
    if 1 in settings.num_steps:
        check_one_step(experiment, settings.weighting, "config.consistency.num_steps holds 1")
