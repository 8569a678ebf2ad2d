"""Continuous-time consistency distillation: the student's x is constant along the teacher's path.

Lu & Song 2025, arXiv:2410.11081, "sCD". With the angle phi = arctan(sigma/alpha), z moves along the
teacher's path by dz/dphi = v_T, and a student that predicts v reaches data by

    (1)  f(z, phi) = cos(phi) z - sin(phi) v
    (2)  cos(phi) df/dphi = -cos^2(phi) (v - v_T) - cos(phi) sin(phi) (z + dv/dphi) = g
    (3)  dv/dphi = the derivative of the student along (v_T, 1), in forward mode
    (4)  L = |v - sg(v + g / (|g| + c))|^2

df/dphi is zero for the exact consistency function. The second term of (2) is the less stable one: a
factor r raises it from 0 to 1 over the first updates. |g| is a root mean square here, so that c doesn't
depend on the number of pixels; the paper's learned weighting over noise levels is left out. The student
samples in one step. The paper trains a student for one w; here w is an input, as in all stages after the
first.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp

from guided_distill import draws, kinds
from guided_distill.diffusion.guidance import Condition, Denoiser
from guided_distill.diffusion.process import add_noise, broadcast_to_rank, levels, velocity
from guided_distill.diffusion.schedules import CHAINS, Schedule
from guided_distill.errors import UserError
from guided_distill.models.embeddings import TIME_SCALE
from guided_distill.models.registry import Network, Params
from guided_distill.objectives.stage import (
    Batch,
    Examples,
    LossFunction,
    Optimization,
    SecondStage,
    check_stage_one,
)
from guided_distill.objectives.weighting import Loss

if TYPE_CHECKING:
    from guided_distill.config import Experiment

SMOOTH_TIME_SCALE = 50.0
"""The largest time_scale of a network that is differentiated in time: 8 periods over [0, 1]."""


@dataclass(frozen=True)
class Continuous(Optimization):
    """Settings of continuous-time consistency distillation."""

    tangent_warmup: kinds.Fraction = 0.1
    """The share of the updates over which r rises to 1."""
    tangent_offset: kinds.Positive = 0.1
    """c, which keeps a small g small."""


def tangent(
    student: Denoiser,
    teacher: Denoiser,
    z: jax.Array,
    t: jax.Array,
    condition: Condition,
    w: jax.Array,
    *,
    schedule: Schedule,
) -> tuple[jax.Array, jax.Array]:
    """The two terms of g at z [B, ...] and t [B], equation (2)."""

    def angle(t: jax.Array) -> jax.Array:
        return jnp.arctan(jnp.exp(-0.5 * schedule(t)))

    def v_of_student(z: jax.Array, t: jax.Array) -> jax.Array:
        return velocity(student.predict(z, t, condition, w), schedule(t))

    _, speed = jax.jvp(angle, (t,), (jnp.ones_like(t),))
    speed = broadcast_to_rank(speed, z)
    log_snr = schedule(t)
    v_teacher = velocity(teacher.predict(z, t, condition, w), log_snr)
    v, v_per_time = jax.jvp(v_of_student, (z, t), (v_teacher * speed, jnp.ones_like(t)))
    cos, sin = levels(log_snr, z)
    return -(cos**2) * (v - v_teacher), -cos * sin * (z + v_per_time / speed)


def continuous_loss(
    student: Denoiser,
    teacher: Denoiser,
    examples: Examples,
    *,
    schedule: Schedule,
    settings: Continuous,
    w_range: tuple[float, float],
    update: int | jax.Array,
) -> Loss:
    """Loss (4) at t ~ U[0, 1] and w ~ U[w_range]. update: the number of updates so far.

    The aux figure "tangent" is the root mean square of g.
    """
    x, condition, keys = examples
    time_keys, noise_keys, weight_keys = draws.split(keys, 3)
    t = draws.uniforms(time_keys)
    w = draws.uniforms(weight_keys, *w_range)
    log_snr = schedule(t)
    z = add_noise(x, draws.normals(noise_keys, x.shape[1:]), log_snr=log_snr)
    towards_teacher, along_path = tangent(student, teacher, z, t, condition, w, schedule=schedule)
    share = jnp.minimum((update + 1) / (settings.tangent_warmup * settings.steps + 1), 1.0)
    g = jax.lax.stop_gradient(towards_teacher + share * along_path)
    axes = tuple(range(1, g.ndim))
    size = jnp.sqrt(jnp.mean(jnp.square(g), axis=axes))
    g = g / broadcast_to_rank(size + settings.tangent_offset, g)
    v = velocity(student.predict(z, t, condition, w), log_snr)
    error = v - jax.lax.stop_gradient(v) - g
    return Loss(jnp.mean(jnp.square(error), axis=axes), {"tangent": size})


class ContinuousStage(SecondStage):
    """The training of a student of one step from stage one."""

    kind = "continuous"

    @classmethod
    def students(cls, experiment: "Experiment") -> list[list[Self]]:
        """One student, of one step."""
        settings = experiment.continuous
        return [[cls(settings, settings.steps, experiment.guidance.w_range, 1, "ddim")]]

    @classmethod
    def check(cls, experiment: "Experiment") -> None:
        """Raises UserError also for a run without stage one, or whose network is steep in time."""
        super().check(experiment)
        if cls.is_used(experiment):
            _check_run(experiment)

    def loss(self, student: Network, teacher: Network) -> LossFunction:
        """`continuous_loss` of a batch."""
        assert self.w_range is not None
        w_range = self.w_range

        def loss(params: Params, frozen: Any, batch: Batch, keys: jax.Array) -> Loss:
            return continuous_loss(
                student.denoiser(params),
                teacher.denoiser(frozen["params"]),
                Examples.of(batch, keys),
                schedule=student.schedule,
                settings=self.settings,
                w_range=w_range,
                update=frozen["update"],
            )

        return loss


def _check_run(experiment: "Experiment") -> None:
    model = experiment.model
    check_stage_one(experiment)
    if model.schedule in CHAINS:
        raise UserError(
            f"config.second_stage is continuous, which differentiates in time, but config.model.schedule "
            f"is {model.schedule}, a chain of discrete noise levels: make it cosine"
        )
    if model.parameterization == "eps":
        raise UserError(
            "config.second_stage is continuous, whose student samples from t = 1 alone, where eps hardly "
            "determines x: make config.model.parameterization v"
        )
    if model.options.get("time_scale", TIME_SCALE) > SMOOTH_TIME_SCALE:
        raise UserError(
            f"config.second_stage is continuous, which differentiates the network in time: set "
            f"config.model.options.time_scale to at most {SMOOTH_TIME_SCALE:g}, such as 10, in the "
            f"teacher too"
        )
