"""Stage one: a single network, conditioned on w, learns the guided output of its teacher."""

from dataclasses import dataclass
from typing import Annotated, Any

import jax

from guided_distill import draws, kinds
from guided_distill.diffusion.guidance import Denoiser, with_guidance
from guided_distill.diffusion.process import add_noise
from guided_distill.diffusion.schedules import Schedule
from guided_distill.models.embeddings import W_FEATURES
from guided_distill.models.registry import Network, Params
from guided_distill.objectives.stage import Batch, Examples, LossFunction, Optimization, Stage
from guided_distill.objectives.weighting import Loss, Weighting, prediction_loss


@dataclass(frozen=True)
class Guidance(Optimization):
    """Stage one. The w range is the student's for good: the later rounds and samplers keep to it.

    w_embedding, the student's for good too: how the network sees w, "fourier" as it sees time (the
    paper's way, and the one that diffusers knows), or "scalar" as the number itself.
    clipped, here and in Halving: distill the teacher as samplers of images use it, with its x held to
    [-1, 1]; not in the papers.
    """

    weighting: Weighting = "snr"
    clipped: bool = False
    w_min: kinds.Weight = 0.0
    w_max: kinds.Weight = 4.0
    w_embedding: Annotated[str, kinds.OneOf(W_FEATURES)] = "fourier"

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

    Meng et al. 2023, stage one. Raises ValueError if the teacher is guided already.
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
