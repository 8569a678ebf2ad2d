"""A stage is one training of a run. Each kind of stage has its own file beside this one."""

import abc
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, Self

import jax

from guided_distill import kinds
from guided_distill.diffusion.guidance import Condition
from guided_distill.diffusion.samplers import ENCODE
from guided_distill.diffusion.schedules import CHAINS, loses_x
from guided_distill.errors import UserError
from guided_distill.models.registry import Network
from guided_distill.objectives.weighting import Loss

if TYPE_CHECKING:
    from guided_distill.config import Experiment

LEARNING_RATE_SCHEDULES = ("constant", "linear", "cosine")

Batch = Mapping[str, jax.Array]
LossFunction = Callable[[Any, Any, Batch, jax.Array], Loss]
"""f(params, frozen, batch, keys [B]) -> Loss. `Stage.loss` describes the frozen argument."""


class Examples(NamedTuple):
    """A batch: clean data x [B, ...], its condition [B, ...], and the random keys [B] of its examples."""

    x: jax.Array
    condition: Condition
    keys: jax.Array

    @classmethod
    def of(cls, batch: Batch, keys: jax.Array) -> Self:
        """The examples of a batch from the input pipeline, which calls the data "image"."""
        return cls(
            batch["image"], {name: each for name, each in batch.items() if name != "image"}, keys
        )


@dataclass(frozen=True)
class Optimization:
    """How a stage optimizes its network."""

    steps: kinds.Count = 1000
    """The number of updates."""
    batch_size: kinds.BatchSize = 128
    """Examples per update, over all devices."""
    accumulation: kinds.Count = 1
    """The number of parts in which the gradient of a batch is computed, one after the other."""
    learning_rate: kinds.Positive = 1e-3
    """Adam's learning rate after the warm-up."""
    learning_rate_schedule: Annotated[str, kinds.OneOf(LEARNING_RATE_SCHEDULES)] = "constant"
    """How the learning rate falls after the warm-up."""
    warmup_steps: kinds.Whole = 0
    """Updates in which the learning rate rises from 0."""
    weight_decay: kinds.NotNegative = 0.0
    """Adam's decoupled weight decay."""
    gradient_clip: kinds.Positive = 1.0
    """The largest norm of the gradient; a longer one is scaled down to it."""
    ema_decay: kinds.Fraction = 0.0
    """Decay of the exponential moving average of the weights, which is the stage's result; with 0 the
    result is the weights themselves."""

    @property
    def fewest_updates(self) -> int:
        """Updates of the shortest training that has these settings."""
        return self.steps


def check_optimization(section: str, settings: Optimization) -> None:
    """Raises UserError, naming the key, for settings of `config.<section>` that don't fit each other."""
    if settings.batch_size % settings.accumulation:
        raise UserError(
            f"config.{section}.accumulation is {settings.accumulation}, which doesn't divide "
            f"config.{section}.batch_size, {settings.batch_size}: choose one that does"
        )
    if settings.warmup_steps >= settings.fewest_updates:
        raise UserError(
            f"config.{section}.warmup_steps is {settings.warmup_steps}, but the stage has only "
            f"{settings.fewest_updates} updates by config.{section}: make the warm-up shorter"
        )


def check_stage_one(experiment: "Experiment") -> None:
    """Raises UserError if the run has no stage one, for a second stage that only it can teach."""
    if experiment.method != "guided":
        raise UserError(
            f"config.second_stage is {experiment.second_stage}, whose teacher is stage one, which "
            f"config.method {experiment.method} leaves out: make it guided"
        )


def check_one_step(experiment: "Experiment", weighting: str, cause: str) -> None:
    """Raises UserError, beginning with `cause`, if a student of one step can't be trained this way."""
    model = experiment.model
    if model.parameterization == "eps" and loses_x(model.schedule, model.schedule_options):
        raise UserError(
            f"{cause}, but a student of one step sees only t = 1, where eps hardly determines x: make it "
            f"2, or config.model.parameterization v"
        )
    if weighting == "snr" and model.schedule not in CHAINS:
        raise UserError(
            f"{cause}, but config.{experiment.second_stage}.weighting is snr, which is 0 at t = 1, the "
            f"only time that a student of one step sees: choose another, or make it 2"
        )


def stage_name(kind: str, sampler: str | None, num_steps: int | None) -> str:
    """The name of a stage's folder in the workdir."""
    return "_".join(str(part) for part in (kind, sampler, num_steps) if part)


@dataclass(frozen=True)
class Stage(abc.ABC):
    """One training of a run, the base class of all kinds.

    kind: the name of the kind, and of its section in the config. words: the kind in words.

    settings: the section of the config. total_steps: the number of updates; 0 if the stage's result is
    its teacher, unchanged. w_range: the guidance weights [w_min, w_max] that the network is conditioned
    on; None if it doesn't take w. num_steps, sampler: those that a student is trained for.
    """

    kind: ClassVar[str]
    words: ClassVar[str]

    settings: Any
    total_steps: int
    w_range: tuple[float, float] | None = None
    num_steps: int | None = None
    sampler: str | None = None

    @property
    def name(self) -> str:
        """The stage's folder in the workdir."""
        return stage_name(self.kind, self.sampler, self.num_steps)

    @property
    def takes_w(self) -> bool:
        """Whether the network is conditioned on w, so that one call predicts the guided output."""
        return self.w_range is not None

    @property
    def program(self) -> Self:
        """The stage without its N, which is an argument of the compiled step: rounds share a program."""
        return replace(self, num_steps=None)

    @classmethod
    def is_used(cls, experiment: "Experiment") -> bool:
        """Whether the run trains stages of this kind."""
        return True

    @classmethod
    @abc.abstractmethod
    def extend(cls, chain: list["Stage"], experiment: "Experiment") -> list[list["Stage"]]:
        """The chains that continue `chain` with this kind's stages; [chain] if the run has none."""

    @classmethod
    def check(cls, experiment: "Experiment") -> None:
        """Raises UserError, naming the key, if the kind's settings don't fit each other or the model."""
        model, settings = experiment.model, getattr(experiment, cls.kind)
        check_optimization(cls.kind, settings)
        weighting = getattr(settings, "weighting", "snr")
        if (
            cls.is_used(experiment)
            and model.parameterization == "eps"
            and weighting != "snr"
            and loses_x(model.schedule, model.schedule_options)
        ):
            raise UserError(
                f"config.{cls.kind}.weighting is {weighting}, which magnifies errors of eps near t = 1 "
                f"beyond all others: make it snr, or config.model.parameterization v"
            )

    @abc.abstractmethod
    def loss(self, student: Network, teacher: Network) -> LossFunction:
        """The loss that trains `student`.

        Its frozen argument holds the teacher's rounded "params", the stage's "num_steps", an int32, the
        "null" condition, and the number of updates before this one, "update", an int32.
        """

    def samplings(self, experiment: "Experiment") -> list[tuple[str, int]]:
        """The samplers that `evaluate` measures the stage with, each with its number of steps.

        A student of N steps has its own, and an encoder has none. Another network conditioned on w takes
        as many steps as the first round's teacher. A teacher is sampled as `experiment.evaluation` says.
        """
        if self.sampler == ENCODE:
            return []
        if self.sampler is not None and self.num_steps is not None:
            return [(self.sampler, self.num_steps)]
        if self.takes_w:
            return [("ddim", experiment.default_num_steps)]
        evaluation = experiment.evaluation
        return list(itertools.product(evaluation.teacher_samplers, evaluation.teacher_num_steps))


class SecondStage(Stage):
    """A kind of stage that trains few-step students; a run has the one that `second_stage` names."""

    words = "student"

    @classmethod
    @abc.abstractmethod
    def students(cls, experiment: "Experiment") -> list[list[Self]]:
        """For each sampler, the stages that train its students, each the teacher of the next."""

    @property
    def teacher_num_steps(self) -> int | None:
        """The N of a student of the same sampler that can be its teacher; None if only stage one can."""
        return None

    @classmethod
    def is_used(cls, experiment: "Experiment") -> bool:
        """Whether the config names this kind."""
        return experiment.second_stage == cls.kind

    @classmethod
    def extend(cls, chain: list[Stage], experiment: "Experiment") -> list[list[Stage]]:
        """A chain for each sampler."""
        if not cls.is_used(experiment):
            return [chain]
        return [[*chain, *students] for students in cls.students(experiment)]
