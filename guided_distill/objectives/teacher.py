"""The teacher: one network, conditional and unconditional by dropping conditions."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from guided_distill import draws, kinds
from guided_distill.diffusion.guidance import Condition, Denoiser, without_condition
from guided_distill.diffusion.process import Prediction, add_noise, broadcast_to_rank
from guided_distill.diffusion.schedules import Schedule
from guided_distill.errors import UserError
from guided_distill.models.registry import Network, Params
from guided_distill.objectives.stage import Batch, Examples, LossFunction, Optimization, Stage
from guided_distill.objectives.weighting import Loss, Weighting, prediction_loss

if TYPE_CHECKING:
    from guided_distill.config import Experiment


@dataclass(frozen=True)
class Teacher(Optimization):
    """Settings of the teacher, one network that predicts with and without a condition."""

    weighting: Weighting = "snr_plus_one"
    """The weight of the loss at each noise level."""
    label_dropout: kinds.Fraction = 0.1
    """The share of examples whose condition, a label or a text, is dropped."""
    dropout: kinds.Fraction = 0.0
    """The share of activations that the network drops in training."""
    initial: str | None = None
    """The folder of a teacher to start from, or its .safetensors file. It may predict something else than
    config.model.parameterization: a teacher that predicts eps is fine-tuned to predict v this way."""


def drop_conditions(
    condition: Condition, keys: jax.Array, *, null: Condition, rate: float
) -> Condition:
    """Replace each example's condition [B, ...] by `null` with probability `rate`."""
    nothing = without_condition(condition, null)
    dropped = draws.bernoullis(keys, rate)
    return {
        name: jnp.where(broadcast_to_rank(dropped, nothing[name]), nothing[name], value)
        for name, value in condition.items()
    }


def teacher_loss(
    student: Denoiser, examples: Examples, *, schedule: Schedule, settings: Teacher
) -> Loss:
    """Denoise examples at t ~ U[0, 1], some without a condition (Ho & Salimans 2022, algorithm 1).

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

    kind = words = "teacher"

    @classmethod
    def is_used(cls, experiment: "Experiment") -> bool:
        """Whether the run trains its teacher itself."""
        return not experiment.start_from

    @classmethod
    def extend(cls, chain: list[Stage], experiment: "Experiment") -> list[list[Stage]]:
        """One chain, which the teacher begins."""
        settings = experiment.teacher
        return [[*chain, cls(settings, settings.steps)]]

    @classmethod
    def check(cls, experiment: "Experiment") -> None:
        """Raises UserError also if guidance needs predictions that the teacher doesn't learn."""
        super().check(experiment)
        guided = experiment.method == "two_student" or experiment.guidance.w_range != (0.0, 0.0)
        if cls.is_used(experiment) and guided and experiment.teacher.label_dropout == 0.0:
            raise UserError(
                "config.teacher.label_dropout is 0, so the teacher never learns to predict without a "
                "condition, which guidance needs: make it greater than 0, such as 0.1"
            )

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
