"""Stage two: a student of N steps learns to do in one step what its teacher does in two.

Meng et al. 2023: deterministic and stochastic students, and encoders; Salimans & Ho 2022, algorithm 2.
On the grid i/N the student learns one DDIM jump from t to s, for i in 1..N:

    ddim         t = i/N        s = t - 1/N    the teacher stops at t - 1/(2N)
    stochastic   t = i/N        s = t - 2/N    the teacher stops at t - 1/N; the stochastic sampler makes
                                               this jump, and then adds noise back over 1/N
    encode       t = (i-1)/N    s = t + 1/N    DDIM from data to noise; the teacher stops at t + 1/(2N)

Samplers return x at t = 0, so the target of a jump to t = 0 is the teacher's second x. The stochastic
student's jump from t = 1/N also ends at 0; the teacher makes it in one step, and the target is its first
x. At N = 1 this is the only jump, so the stochastic student of one step is its teacher, untrained.
"""

import itertools
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
from guided_distill.diffusion.schedules import (
    CHAINS,
    NUM_TIMESTEPS,
    Schedule,
    arrival,
)
from guided_distill.errors import UserError
from guided_distill.models.registry import Network, Params
from guided_distill.objectives.stage import (
    Batch,
    Examples,
    LossFunction,
    Optimization,
    SecondStage,
    check_one_step,
)
from guided_distill.objectives.teacher import drop_conditions
from guided_distill.objectives.weighting import Loss, Weighting, prediction_loss

if TYPE_CHECKING:
    from guided_distill.config import Experiment

# The teacher of N steps takes 2N.
_Rounds = Annotated[int, kinds.Range(1, 2**13)]


class Jump(NamedTuple):
    """The times [B] of a jump: its start, the teacher's stop on the way, and its end."""

    t: jax.Array
    half: jax.Array
    end: jax.Array


JUMPS: dict[str, Callable[[jax.Array, int | jax.Array], Jump]] = {
    "ddim": lambda i, n: Jump(i / n, (i - 0.5) / n, (i - 1) / n),
    "stochastic": lambda i, n: Jump(i / n, (i - 1) / n, jnp.maximum(i - 2, 0) / n),
    ENCODE: lambda i, n: Jump((i - 1) / n, (i - 0.5) / n, i / n),
}
"""f(i [B] in 1..N, N) -> the i-th jump of a student that is trained for this sampler."""


@dataclass(frozen=True)
class Halving(Optimization):
    """Settings of stage two: rounds with N = first_num_steps, first_num_steps/2 ... last_num_steps."""

    weighting: Weighting = "truncated_snr"
    """The weight of the loss at each noise level."""
    clipped: bool = False
    """As in stage one. Encoders ignore it."""
    first_num_steps: _Rounds = 32
    """Steps of the first round's student: last_num_steps times a power of two."""
    last_num_steps: _Rounds = 1
    """Steps of the last round's student."""
    few_step_factor: kinds.Count = 2
    """A factor for the updates of the rounds N = 2 and N = 1."""
    round_steps: tuple[kinds.Count, ...] = ()
    """The updates of each round; if empty, they follow from steps and few_step_factor."""
    samplers: tuple[Annotated[str, kinds.OneOf(JUMPS)], ...] = ("ddim",)
    """Each has its own chain of students, which are trained on its jumps."""

    def rounds(self) -> tuple[int, ...]:
        """The N of every round, in the order of training."""
        rounds = [self.first_num_steps]
        while rounds[-1] > self.last_num_steps:
            rounds.append(rounds[-1] // 2)
        return tuple(rounds)

    def updates(self, num_steps: int) -> int:
        """Updates of the round that trains the student of `num_steps` steps."""
        if self.round_steps:
            return self.round_steps[self.rounds().index(num_steps)]
        return self.steps * (self.few_step_factor if num_steps <= 2 else 1)

    @property
    def fewest_updates(self) -> int:
        """Updates of the shortest round."""
        return min(map(self.updates, self.rounds()))

    def is_its_teacher(self, num_steps: int, sampler: str) -> bool:
        """Whether a student's only jump is one of its teacher's, so that it has nothing to learn.

        The first round's student does: its teacher may be another network, or guided.
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
    second: Denoiser | None = None,
) -> Prediction:
    """The prediction at z [B, ...] that makes the teacher's two DDIM steps in one: equation (6).

    second: the denoiser that makes the second step; None for the teacher.
    """
    log_snr_h = arrival(schedule, jump.half)
    at_start = teacher.predict(z, jump.t, condition, w)
    on_the_way = (second or teacher).predict(
        ddim_step(at_start, log_snr_h), jump.half, condition, w
    )
    return two_steps_in_one(
        at_start,
        on_the_way,
        log_snr_t=schedule(jump.t),
        log_snr_h=log_snr_h,
        log_snr_s=arrival(schedule, jump.end),
    )


class Round(NamedTuple):
    """The N, traced or not, and the key of JUMPS that a student is trained for."""

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
    """Match two steps of the teacher in one, on a jump drawn uniformly and at w ~ U[w_range].

    With a traced N, all rounds share one compilation. settings.clipped: the teacher clips x in both
    steps, as its sampler does, and `prediction_loss` clips x too; encoding never clips. w_range is None
    if neither network takes w (the paper's two-student baseline). Raises ValueError if only one of them
    takes w: stage one alone distills guidance.
    """
    if student.guided != teacher.guided:
        raise ValueError(
            "step halving needs a w-conditioned teacher for a w-conditioned student: run the "
            "guidance stage first"
        )
    # At t = 0 x is z, so that a pixel at an end of the range would match whatever eps is.
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


class HalvingStage(SecondStage):
    """A round of the paper's stage two."""

    kind = "halving"

    @classmethod
    def students(cls, experiment: "Experiment") -> list[list[Self]]:
        """For each sampler, its rounds."""
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

    @property
    def teacher_num_steps(self) -> int | None:
        """Twice its own N."""
        return None if self.num_steps is None else 2 * self.num_steps

    @classmethod
    def check(cls, experiment: "Experiment") -> None:
        """Raises UserError also for rounds that don't halve, or that the model can't be trained for."""
        _check_rounds(experiment.halving)
        super().check(experiment)
        if cls.is_used(experiment):
            _check_model(experiment)

    def loss(self, student: Network, teacher: Network) -> LossFunction:
        """`halving_loss` of a batch."""
        sampler = self.sampler
        assert sampler is not None

        def loss(params: Params, frozen: Any, batch: Batch, keys: jax.Array) -> Loss:
            learner = student.denoiser(params, null=frozen["null"])
            tutor = teacher.denoiser(frozen["params"], null=frozen["null"])
            examples = Examples.of(batch, keys)
            if learner.null is not None:
                # One network holds two students: half of the examples train the unconditional one.
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


def _check_rounds(settings: Halving) -> None:
    first, last = settings.first_num_steps, settings.last_num_steps
    if not settings.samplers:
        raise UserError(
            f"config.halving.samplers is empty; name at least one of {', '.join(JUMPS)}"
        )
    rounds = settings.rounds()
    if rounds[-1] != last or any(a != 2 * b for a, b in itertools.pairwise(rounds)):
        raise UserError(
            f"config.halving.first_num_steps is {first}, which can't be halved down to "
            f"config.halving.last_num_steps, {last}: make it {last} times a power of two"
        )
    if settings.round_steps and len(settings.round_steps) != len(rounds):
        raise UserError(
            f"config.halving.round_steps has {len(settings.round_steps)} numbers for {len(rounds)} "
            f"rounds, from {first} to {last}: give one for each, or none"
        )
    for num_steps in rounds:
        kinds.check(
            "config.halving.steps times few_step_factor", settings.updates(num_steps), kinds.Count
        )


def _check_model(experiment: "Experiment") -> None:
    model, settings = experiment.model, experiment.halving
    first = settings.first_num_steps
    if model.schedule in CHAINS and 2 * first > NUM_TIMESTEPS:
        raise UserError(
            f"config.halving.first_num_steps is {first}, whose teacher takes {2 * first} steps, but "
            f"config.model.schedule is {model.schedule}, a chain of {NUM_TIMESTEPS}: make it smaller"
        )
    if settings.last_num_steps == 1 and set(settings.samplers) != {ENCODE}:
        check_one_step(experiment, settings.weighting, "config.halving.last_num_steps is 1")
    if model.parameterization == "x" and ENCODE in settings.samplers:
        raise UserError(
            f"config.halving.samplers holds {ENCODE}, but config.model.parameterization is x, which "
            f"doesn't determine eps at t = 0, where encoding begins: make it v, or take {ENCODE} out"
        )
