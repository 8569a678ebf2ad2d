"""What each stage of a run is: its place in the chain, its loss, its compiled step."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from guided_distill.config import (
    Evaluation,
    Experiment,
    Guidance,
    Halving,
    Optimization,
    Teacher,
    stage_name,
)
from guided_distill.diffusion.guidance import Condition, with_guidance
from guided_distill.diffusion.samplers import ENCODE
from guided_distill.errors import UserError
from guided_distill.models.registry import Network, Params
from guided_distill.objectives.guidance import guidance_loss
from guided_distill.objectives.halving import halving_loss, is_its_teacher
from guided_distill.objectives.teacher import drop_conditions, teacher_loss
from guided_distill.objectives.weighting import Loss
from guided_distill.training.state import make_optimizer
from guided_distill.training.step import Batch, LossFunction, TrainStep, make_train_step


@dataclass(frozen=True)
class Stage:
    """One training: the teacher, stage one, or a halving round to `num_steps` for `sampler`.

    total_steps: updates; none where the stage's teacher is already what it is to be.
    takes_w: whether its network takes the guidance weight, and so has guidance inside.
    """

    kind: str
    settings: Optimization
    total_steps: int
    takes_w: bool
    num_steps: int | None = None
    sampler: str | None = None

    @property
    def name(self) -> str:
        """The stage's folder in the workdir."""
        return stage_name(self.kind, self.sampler, self.num_steps)


def chains(experiment: Experiment) -> list[list[Stage]]:
    """The run's stages: one chain for each student sampler, each stage the teacher of the next.

    All chains begin with the same teacher and, in the paper's method, the same guidance stage.
    """
    start = [Stage("teacher", experiment.teacher, experiment.teacher.steps, takes_w=False)]
    if experiment.method == "guided":
        start.append(
            Stage("guidance", experiment.guidance, experiment.guidance.steps, takes_w=True)
        )
    takes_w = experiment.method != "two_student"
    return [
        start
        + [
            Stage(
                "halving", experiment.halving, _updates(experiment, n, sampler), takes_w, n, sampler
            )
            for n in experiment.rounds()
        ]
        for sampler in experiment.halving.samplers
    ]


def _updates(experiment: Experiment, num_steps: int, sampler: str) -> int:
    """Of a halving round; a first one has another network's weights, or guidance, to take up."""
    first = num_steps == experiment.halving.first_num_steps
    if is_its_teacher(sampler, num_steps) and not first:
        return 0
    return experiment.round_steps(num_steps)


def all_stages(experiment: Experiment) -> list[Stage]:
    """Every stage once, in the order of training."""
    return list(dict.fromkeys(stage for chain in chains(experiment) for stage in chain))


def teacher_of(experiment: Experiment, stage: Stage) -> Stage | None:
    """The stage whose weights teach this one; None for the first."""
    chain = next(chain for chain in chains(experiment) if stage in chain)
    place = chain.index(stage)
    return chain[place - 1] if place else None


def samplings(
    stage: Stage, experiment: Experiment, evaluation: Evaluation
) -> list[tuple[str, int]]:
    """The samplers to measure a stage by, each with its number of steps; an encoder has none.

    A student of N steps has its own; one that takes w makes as many steps as the first round's teacher;
    any other is sampled as `evaluation` says of the teacher.
    """
    if stage.sampler == ENCODE:
        return []
    if stage.sampler is not None and stage.num_steps is not None:
        return [(stage.sampler, stage.num_steps)]
    if stage.takes_w:
        return [("ddim", 2 * experiment.halving.first_num_steps)]
    return list(itertools.product(evaluation.teacher_samplers, evaluation.teacher_num_steps))


def check_batch(kind: str, settings: Optimization, *, devices: int) -> None:
    """Raises UserError, naming the key, unless so many devices can share each part of a batch."""
    accumulation = settings.accumulation
    if settings.batch_size % (devices * accumulation):
        parts = f" in {accumulation} parts (config.{kind}.accumulation)" if accumulation > 1 else ""
        raise UserError(
            f"config.{kind}.batch_size is {settings.batch_size}, which {devices} devices can't share"
            f"{parts}: make it a multiple of {devices * accumulation}"
        )


@functools.cache
def compiled_step(
    kind: str,
    settings: Optimization,
    *,
    student: Network,
    teacher: Network,
    mesh: Mesh,
    total_steps: int,
    sampler: str | None,
    w_range: tuple[float, float],
) -> tuple[TrainStep, optax.GradientTransformation]:
    """The train step of a stage and its optimizer; halving rounds of equal length share one.

    The step's frozen argument holds the teacher's "params", rounded, the student's "num_steps" and the
    "null" condition.
    """
    loss = _LOSSES[kind](settings, student, teacher, sampler=sampler, w_range=w_range)
    optimizer = make_optimizer(settings, steps=total_steps)
    step = make_train_step(
        loss,
        optimizer,
        ema_decay=settings.ema_decay,
        mesh=mesh,
        accumulation=settings.accumulation,
        rounded=student.rounded,
    )
    return step, optimizer


def _condition(batch: Batch) -> Condition:
    return {name: each for name, each in batch.items() if name != "image"}


def _teacher_stage(settings: Teacher, student: Network, teacher: Network, **_: Any) -> LossFunction:
    student = student.with_dropout(settings.dropout)

    def loss(params: Params, frozen: Any, batch: Batch, key: jax.Array) -> Loss:
        loss_key, dropout_key = jax.random.split(key)
        return teacher_loss(
            student.denoiser(params, null=frozen["null"], dropout_key=dropout_key),
            batch["image"],
            _condition(batch),
            loss_key,
            schedule=student.schedule,
            weighting=settings.weighting,
            condition_dropout=settings.label_dropout,
        )

    return loss


def _guidance_stage(
    settings: Guidance,
    student: Network,
    teacher: Network,
    *,
    w_range: tuple[float, float],
    **_: Any,
) -> LossFunction:
    def loss(params: Params, frozen: Any, batch: Batch, key: jax.Array) -> Loss:
        return guidance_loss(
            student.denoiser(params),
            teacher.denoiser(frozen["params"], null=frozen["null"]),
            batch["image"],
            _condition(batch),
            key,
            schedule=student.schedule,
            weighting=settings.weighting,
            w_min=w_range[0],
            w_max=w_range[1],
            clipped=settings.clipped,
        )

    return loss


def _halving_stage(
    settings: Halving,
    student: Network,
    teacher: Network,
    *,
    sampler: str,
    w_range: tuple[float, float],
) -> LossFunction:
    def loss(params: Params, frozen: Any, batch: Batch, key: jax.Array) -> Loss:
        learner = student.denoiser(params, null=frozen["null"])
        tutor = teacher.denoiser(frozen["params"], null=frozen["null"])
        condition = _condition(batch)
        if learner.null is not None:
            # Two students in one network: half of the examples go to the unconditional one.
            drop_key, key = jax.random.split(key)
            condition = drop_conditions(condition, drop_key, null=learner.null, rate=0.5)
        elif not tutor.guided:
            tutor = with_guidance(tutor)
        return halving_loss(
            learner,
            tutor,
            batch["image"],
            condition,
            key,
            schedule=student.schedule,
            weighting=settings.weighting,
            w_min=w_range[0],
            w_max=w_range[1],
            num_steps=frozen["num_steps"],
            sampler=sampler,
            clipped=settings.clipped,
        )

    return loss


_LOSSES: dict[str, Callable[..., LossFunction]] = {
    "teacher": _teacher_stage,
    "guidance": _guidance_stage,
    "halving": _halving_stage,
}
