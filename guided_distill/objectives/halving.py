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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from guided_distill import draws, kinds
from guided_distill.diffusion.guidance import Condition, Denoiser, with_clipping, with_guidance
from guided_distill.diffusion.process import (
    Prediction,
    add_noise,
    ddim_step,
    two_steps_in_one,
)
from guided_distill.diffusion.samplers import ENCODE
from guided_distill.diffusion.schedules import Schedule, arrival
from guided_distill.models.registry import Network, Params
from guided_distill.objectives.stage import Batch, Examples, LossFunction, Optimization, Stage
from guided_distill.objectives.teacher import drop_conditions
from guided_distill.objectives.weighting import Loss, Weighting, prediction_loss

if TYPE_CHECKING:
    from guided_distill.config import Experiment

# The teacher of N steps takes 2N.
_Rounds = Annotated[int, kinds.Range(1, 2**13)]


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


@dataclass(frozen=True)
class Halving(Optimization):
    """Stage two: rounds of N = first_num_steps, half of it, ... last_num_steps.

    few_step_factor multiplies the updates of the rounds N = 2 and N = 1; round_steps, where it isn't
    empty, is the updates of every round in turn. Each of `samplers` gets its own chain of students, for
    they are trained on different jumps.
    """

    weighting: Weighting = "truncated_snr"
    clipped: bool = False
    first_num_steps: _Rounds = 32
    last_num_steps: _Rounds = 1
    few_step_factor: kinds.Count = 2
    round_steps: tuple[kinds.Count, ...] = ()
    samplers: tuple[Annotated[str, kinds.OneOf(JUMPS)], ...] = ("ddim",)

    def rounds(self) -> tuple[int, ...]:
        """The N of every round, falling."""
        rounds = [self.first_num_steps]
        while rounds[-1] > self.last_num_steps:
            rounds.append(rounds[-1] // 2)
        return tuple(rounds)

    def updates(self, num_steps: int) -> int:
        """Updates of the round that ends at `num_steps`."""
        if self.round_steps:
            return self.round_steps[self.rounds().index(num_steps)]
        return self.steps * (self.few_step_factor if num_steps <= 2 else 1)

    def is_its_teacher(self, num_steps: int, sampler: str) -> bool:
        """Whether a student's only jump is one of its teacher's own, so that it has nothing to learn.

        A first round has even so: another network's weights, or guidance, to take up.
        """
        return sampler == "stochastic" and num_steps == 1 < self.first_num_steps


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


class Round(NamedTuple):
    """What a student is trained for: N, traced or not, and a key of JUMPS."""

    num_steps: int | jax.Array
    sampler: str


def halving_loss(
    student: Denoiser,
    teacher: Denoiser,
    examples: Examples,
    *,
    schedule: Schedule,
    settings: Halving,
    w_range: tuple[float, float] | None,
    aim: Round,
) -> Loss:
    """Match two steps of the teacher in one, from a jump drawn uniformly at w ~ U[w_range].

    A traced N lets one compilation serve every round. settings.clipped: the teacher's two steps clip x,
    as its sampler does, and the error is that of `prediction_loss`; it plays no part in encoding, which
    never clips. w_range is None without guidance in either (the paper's two-student baseline). Raises
    ValueError if one of the two takes w and the other doesn't: guidance belongs to stage one alone.
    """
    if student.guided != teacher.guided:
        raise ValueError(
            "step halving needs a w-conditioned teacher for a w-conditioned student: run the "
            "guidance stage first"
        )
    # At t = 0 x is z, and a pixel at the end of the range would count as met whatever its eps.
    clipped = settings.clipped and aim.sampler != ENCODE
    if clipped:
        teacher = with_clipping(teacher, schedule)
    x, condition, keys = examples
    index_keys, noise_keys, weight_keys = draws.split(keys, 3)
    i = draws.integers(index_keys, 1, aim.num_steps + 1)
    jump = JUMPS[aim.sampler](i.astype(jnp.float32), aim.num_steps)
    w = draws.uniforms(weight_keys, *w_range) if w_range else None
    log_snr = schedule(jump.t)
    z = add_noise(x, draws.normals(noise_keys, x.shape[1:]), log_snr=log_snr)
    target = jax.lax.stop_gradient(
        halving_target(teacher, z, condition, w, jump=jump, schedule=schedule)
    )
    prediction = student.predict(z, jump.t, condition, w)
    return prediction_loss(
        prediction, target, log_snr=log_snr, weighting=settings.weighting, clipped=clipped
    )


class HalvingStage(Stage):
    """A round of the paper's stage two."""

    kind = "halving"

    @classmethod
    def chains(cls, experiment: "Experiment") -> list[list[Self]]:
        """For each sampler its rounds, each the teacher of the next."""
        settings = experiment.halving
        w_range = None if experiment.method == "two_student" else experiment.guidance.w_range
        return [
            [
                cls(
                    settings,
                    0 if settings.is_its_teacher(n, sampler) else settings.updates(n),
                    w_range,
                    n,
                    sampler,
                )
                for n in settings.rounds()
            ]
            for sampler in settings.samplers
        ]

    def loss(self, student: Network, teacher: Network) -> LossFunction:
        """`halving_loss` of a batch."""
        sampler = self.sampler
        assert sampler is not None

        def loss(params: Params, frozen: Any, batch: Batch, keys: jax.Array) -> Loss:
            learner = student.denoiser(params, null=frozen["null"])
            tutor = teacher.denoiser(frozen["params"], null=frozen["null"])
            examples = Examples.of(batch, keys)
            if learner.null is not None:
                # Two students in one network: half of the examples go to the unconditional one.
                drop_keys, keys = draws.split(keys, 2)
                condition = drop_conditions(
                    examples.condition, drop_keys, null=learner.null, rate=0.5
                )
                examples = Examples(examples.x, condition, keys)
            elif not tutor.guided:
                tutor = with_guidance(tutor)
            return halving_loss(
                learner,
                tutor,
                examples,
                schedule=student.schedule,
                settings=self.settings,
                w_range=self.w_range,
                aim=Round(frozen["num_steps"], sampler),
            )

        return loss
