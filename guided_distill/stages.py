"""The stages of a run, in the order of training, and the compiled step of each."""

import functools
from collections.abc import Iterable

import optax
from jax.sharding import Mesh

from guided_distill.config import AUTOENCODER, KINDS, Experiment
from guided_distill.errors import UserError
from guided_distill.models.registry import Network
from guided_distill.objectives.stage import Optimization, Stage
from guided_distill.training.state import make_optimizer
from guided_distill.training.step import TrainStep, make_train_step


def chains(experiment: Experiment) -> list[list[Stage]]:
    """The run's stages: one chain for each sampler of students, each stage the teacher of the next.

    All chains begin with the same teacher and, in the paper's method, the same guidance stage.
    """
    chains: list[list[Stage]] = [[]]
    for kind in KINDS.values():
        chains = [longer for chain in chains for longer in kind.extend(chain, experiment)]
    return chains


def all_stages(experiment: Experiment) -> list[Stage]:
    """Each stage once, in the order of training."""
    return list(dict.fromkeys(stage for chain in chains(experiment) for stage in chain))


def updates_of(experiment: Experiment, stages: Iterable[Stage]) -> dict[str, int]:
    """The updates of each of these stages by name, after those of the run's own autoencoder, if any."""
    autoencoder = experiment.autoencoder.steps
    first = {AUTOENCODER: autoencoder} if autoencoder else {}
    return first | {stage.name: stage.total_steps for stage in stages}


def teacher_of(experiment: Experiment, stage: Stage) -> Stage | None:
    """The stage that is the teacher of this one; None for the first stage."""
    chain = next(chain for chain in chains(experiment) if stage in chain)
    place = chain.index(stage)
    return chain[place - 1] if place else None


def check_batch(kind: str, settings: Optimization, *, devices: int) -> None:
    """Raises UserError, naming the key, unless `devices` divides each part of a batch."""
    accumulation = settings.accumulation
    if settings.batch_size % (devices * accumulation):
        parts = f" in {accumulation} parts (config.{kind}.accumulation)" if accumulation > 1 else ""
        raise UserError(
            f"config.{kind}.batch_size is {settings.batch_size}, which {devices} devices can't share"
            f"{parts}: make it a multiple of {devices * accumulation}"
        )


def compiled_step(
    stage: Stage, *, student: Network, teacher: Network, mesh: Mesh
) -> tuple[TrainStep, optax.GradientTransformation]:
    """The train step of a stage and its optimizer; stages of one `program` share both.

    The step's frozen argument is that of `Stage.loss`.
    """
    return _compiled_step(stage.program, student, teacher, mesh)


@functools.cache
def _compiled_step(
    stage: Stage, student: Network, teacher: Network, mesh: Mesh
) -> tuple[TrainStep, optax.GradientTransformation]:
    settings = stage.settings
    optimizer = make_optimizer(settings, steps=stage.total_steps)
    step = make_train_step(
        stage.loss(student, teacher),
        optimizer,
        ema_decay=settings.ema_decay,
        mesh=mesh,
        accumulation=settings.accumulation,
        rounded=student.rounded,
    )
    return step, optimizer
