"""The teacher: one network, conditional and unconditional by dropping conditions."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from guided_distill import draws, kinds
from guided_distill.diffusion.guidance import Condition, Denoiser, without_condition
from guided_distill.diffusion.process import Prediction, add_noise, broadcast_to_rank
from guided_distill.diffusion.schedules import Schedule
from guided_distill.models.registry import Network, Params
from guided_distill.objectives.stage import Batch, Examples, LossFunction, Optimization, Stage
from guided_distill.objectives.weighting import Loss, Weighting, prediction_loss


@dataclass(frozen=True)
class Teacher(Optimization):
    """The guided diffusion model: conditional and unconditional in one network.

    label_dropout: the share of examples that lose their condition, be it a label or a text.
    initial: the folder of another run's teacher to start from, or its .safetensors file, whatever it
    predicts: so one of eps becomes one of v.
    """

    weighting: Weighting = "snr_plus_one"
    label_dropout: kinds.Fraction = 0.1
    dropout: kinds.Fraction = 0.0
    initial: str | None = None


def drop_conditions(
    condition: Condition, keys: jax.Array, *, null: Condition, rate: float
) -> Condition:
    """The condition [B, ...] with each example's replaced by `null` at probability `rate`."""
    nothing = without_condition(condition, null)
    dropped = draws.bernoullis(keys, rate)
    return {
        name: jnp.where(broadcast_to_rank(dropped, nothing[name]), nothing[name], value)
        for name, value in condition.items()
    }


def teacher_loss(
    student: Denoiser, examples: Examples, *, schedule: Schedule, settings: Teacher
) -> Loss:
    """Denoise examples at t ~ U[0, 1], some without condition (Ho & Salimans 2022, algorithm 1).

    Raises ValueError if the student has no null condition.
    """
    if student.null is None:
        raise ValueError("dropping conditions needs a denoiser with a null condition")
    x, condition, keys = examples
    time_keys, noise_keys, drop_keys = draws.split(keys, 3)
    t = draws.uniforms(time_keys)
    eps = draws.normals(noise_keys, x.shape[1:])
    condition = drop_conditions(
        condition, drop_keys, null=student.null, rate=settings.label_dropout
    )
    log_snr = schedule(t)
    prediction = student.predict(add_noise(x, eps, log_snr=log_snr), t, condition, None)
    return prediction_loss(
        prediction, Prediction(x, eps), log_snr=log_snr, weighting=settings.weighting
    )


class TeacherStage(Stage):
    """The first stage of a run; it has no teacher."""

    kind = "teacher"

    def loss(self, student: Network, teacher: Network) -> LossFunction:
        """`teacher_loss` of a batch."""
        student = student.with_dropout(self.settings.dropout)

        def loss(params: Params, frozen: Any, batch: Batch, keys: jax.Array) -> Loss:
            keys, dropout_keys = draws.split(keys, 2)
            learner = student.denoiser(
                params,
                null=frozen["null"],
                dropout_keys=dropout_keys if self.settings.dropout else None,
            )
            return teacher_loss(
                learner,
                Examples.of(batch, keys),
                schedule=student.schedule,
                settings=self.settings,
            )

        return loss
