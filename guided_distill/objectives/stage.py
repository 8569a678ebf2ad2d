"""What a stage is: one training of a run. Its kinds are beside this file, each described once."""

import abc
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, Self

import jax

from guided_distill import kinds
from guided_distill.diffusion.guidance import Condition
from guided_distill.diffusion.samplers import ENCODE
from guided_distill.models.registry import Network
from guided_distill.objectives.weighting import Loss

if TYPE_CHECKING:
    from guided_distill.config import Experiment

LEARNING_RATE_SCHEDULES = ("constant", "linear", "cosine")

Batch = Mapping[str, jax.Array]
LossFunction = Callable[[Any, Any, Batch, jax.Array], Loss]
"""f(params, frozen, batch, keys [B]) -> Loss. frozen: what doesn't change, as `Stage.loss` says."""


class Examples(NamedTuple):
    """A batch: clean data x [B, ...], its condition [B, ...] each, and a key [B] each to draw from."""

    x: jax.Array
    condition: Condition
    keys: jax.Array

    @classmethod
    def of(cls, batch: Batch, keys: jax.Array) -> Self:
        """The examples of a batch from the input pipeline, whose data are its "image"."""
        return cls(
            batch["image"], {name: each for name, each in batch.items() if name != "image"}, keys
        )


@dataclass(frozen=True)
class Optimization:
    """How a network is trained. An ema_decay of 0 keeps no average: the raw weights are the result.

    accumulation: in how many parts, one after the other, the gradient of a batch is computed.
    """

    steps: kinds.Count = 1000
    batch_size: kinds.BatchSize = 128
    accumulation: kinds.Count = 1
    learning_rate: kinds.Positive = 1e-3
    learning_rate_schedule: Annotated[str, kinds.OneOf(LEARNING_RATE_SCHEDULES)] = "constant"
    warmup_steps: kinds.Whole = 0
    weight_decay: kinds.NotNegative = 0.0
    gradient_clip: kinds.Positive = 1.0
    ema_decay: kinds.Fraction = 0.0


def stage_name(kind: str, sampler: str | None, num_steps: int | None) -> str:
    """The folder of a stage in its run's."""
    return "_".join(str(part) for part in (kind, sampler, num_steps) if part)


@dataclass(frozen=True)
class Stage(abc.ABC):
    """One training of a run.

    settings: the section of the config that has the stage's kind as its name. total_steps: its updates;
    0 where its teacher is already what it is to be. w_range: the guidance weights [w_min, w_max] that its
    network is conditioned on; None where the network doesn't take w. num_steps, sampler: those that a
    student of N steps is trained for.
    """

    kind: ClassVar[str]

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
        """Whether its network takes the guidance weight, and so has guidance inside."""
        return self.w_range is not None

    @property
    def program(self) -> Self:
        """What the compiled step depends on: N is an argument of it, so rounds of one length share it."""
        return replace(self, num_steps=None)

    @abc.abstractmethod
    def loss(self, student: Network, teacher: Network) -> LossFunction:
        """The loss that trains `student`.

        Its frozen argument holds the teacher's "params", rounded, "num_steps", an int32, and "null", the
        condition that stands for none.
        """

    def samplings(self, experiment: "Experiment") -> list[tuple[str, int]]:
        """The samplers to measure the stage by, each with its number of steps; none of an encoder.

        A student of N steps has its own; another one that takes w makes as many steps as the first
        round's teacher; any other is sampled as `experiment.evaluation` says of the teacher.
        """
        if self.sampler == ENCODE:
            return []
        if self.sampler is not None and self.num_steps is not None:
            return [(self.sampler, self.num_steps)]
        if self.takes_w:
            return [("ddim", 2 * experiment.halving.first_num_steps)]
        evaluation = experiment.evaluation
        return list(itertools.product(evaluation.teacher_samplers, evaluation.teacher_num_steps))
