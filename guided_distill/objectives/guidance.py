"""Stage one: one network, conditioned on w, learns the guided output of its teacher."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import jax

from guided_distill import draws, kinds
from guided_distill.diffusion.guidance import Denoiser, with_guidance
from guided_distill.diffusion.process import add_noise
from guided_distill.diffusion.schedules import Schedule
from guided_distill.errors import UserError
from guided_distill.models.embeddings import W_FEATURES
from guided_distill.models.registry import Network, Params
from guided_distill.objectives.stage import Batch, Examples, LossFunction, Optimization, Stage
from guided_distill.objectives.weighting import Loss, Weighting, prediction_loss

if TYPE_CHECKING:
    from guided_distill.config import Experiment


@dataclass(frozen=True)
class Guidance(Optimization):
    """Settings of stage one."""

    weighting: Weighting = "snr"
    """The weight of the loss at each noise level."""
    clipped: bool = False
    """Distill the teacher with its x clipped to [-1, 1], as samplers of images clip it; not in the
    papers."""
    w_min: kinds.Weight = 0.0
    """The least w that this student and all later ones are conditioned on."""
    w_max: kinds.Weight = 4.0
    """The largest w that they are conditioned on."""
    w_embedding: Annotated[str, kinds.OneOf(W_FEATURES)] = "fourier"
    """How these students embed w: "fourier", as time is (the paper's embedding, which diffusers
    supports), or "scalar", as the number itself."""

    @property
    def w_range(self) -> tuple[float, float]:
        """(w_min, w_max)."""
        return self.w_min, self.w_max


def guidance_loss(
    student: Denoiser,
    teacher: Denoiser,
    examples: Examples,
    *,
    schedule: Schedule,
    settings: Guidance,
) -> Loss:
    """Match the teacher's guided prediction at w ~ U[w_min, w_max], t ~ U[0, 1].

    Meng et al. 2023, stage one. Raises ValueError if the teacher is already guided.
    """
    x, condition, keys = examples
    time_keys, noise_keys, weight_keys = draws.split(keys, 3)
    t = draws.uniforms(time_keys)
    w = draws.uniforms(weight_keys, *settings.w_range)
    log_snr = schedule(t)
    z = add_noise(x, draws.normals(noise_keys, x.shape[1:]), log_snr=log_snr)
    target = jax.lax.stop_gradient(with_guidance(teacher).predict(z, t, condition, w))
    prediction = student.predict(z, t, condition, w)
    return prediction_loss(
        prediction,
        target,
        log_snr=log_snr,
        weighting=settings.weighting,
        clipped=settings.clipped,
    )


class GuidanceStage(Stage):
    """The paper's stage one."""

    kind = "guidance"
    words = "stage one"

    @classmethod
    def is_used(cls, experiment: "Experiment") -> bool:
        """Whether the method is the paper's; its baselines leave stage one out."""
        return experiment.method == "guided"

    @classmethod
    def extend(cls, chain: list[Stage], experiment: "Experiment") -> list[list[Stage]]:
        """One chain, with stage one after the teacher."""
        settings = experiment.guidance
        if not cls.is_used(experiment):
            return [chain]
        return [[*chain, cls(settings, settings.steps, settings.w_range)]]

    @classmethod
    def check(cls, experiment: "Experiment") -> None:
        """Raises UserError also for a w to evaluate that is outside of the trained range."""
        super().check(experiment)
        low, high = experiment.guidance.w_range
        if low > high:
            raise UserError(
                f"config.guidance.w_min is {low}, above config.guidance.w_max, which is {high}: swap them"
            )
        for w in experiment.evaluation.weights:
            if not low <= w <= high:
                raise UserError(
                    f"config.evaluation.weights holds {w}, outside the trained range [{low}, {high}] of "
                    f"config.guidance.w_min and w_max: take it out or widen the range"
                )

    def loss(self, student: Network, teacher: Network) -> LossFunction:
        """`guidance_loss` of a batch."""

        def loss(params: Params, frozen: Any, batch: Batch, keys: jax.Array) -> Loss:
            return guidance_loss(
                student.denoiser(params),
                teacher.denoiser(frozen["params"], null=frozen["null"]),
                Examples.of(batch, keys),
                schedule=student.schedule,
                settings=self.settings,
            )

        return loss
