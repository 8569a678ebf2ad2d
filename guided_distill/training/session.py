"""One training job from start to end: resumes from its newest checkpoint or starts from given weights."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from etils import epath

from guided_distill.data.pipeline import batches
from guided_distill.data.source import Source
from guided_distill.storage import write_text
from guided_distill.training.checkpoints import StageCheckpoints, abstract
from guided_distill.training.job import Job
from guided_distill.training.loop import train
from guided_distill.training.metrics import MetricsLog, Writer, parameter_table
from guided_distill.training.processes import is_first, process_order
from guided_distill.training.state import TrainState, split_initial_state
from guided_distill.training.step import TrainStep
from guided_distill.training.wandb_log import WeightsAndBiases


def save_result(directory: epath.Path, params: Any, *, about: Mapping[str, Any]) -> None:
    """Save `params` as the result of a stage without updates. Raises UserError if the disk is full."""
    with StageCheckpoints(directory) as checkpoints:
        checkpoints.save_result(0, params, about=about)


def train_in(
    job: Job,
    source: Source,
    program: tuple[TrainStep, optax.GradientTransformation],
    *,
    shapes: Any,
    initial: Callable[[], Any],
    frozen: Any,
    flip: bool = False,
) -> TrainState:
    """Train on the source, from the newest checkpoint or from `initial()`, and return the final state.

    program: the train step and its optimizer. initial: returns the weights at step 0, with these shapes
    and placed on the mesh. A resumed job never calls it, so the devices hold no state but the restored
    one. frozen: the teacher's weights, as in `make_train_step`. flip: mirror half of the images. Writes
    checkpoints/, the log and parameters.txt to the job's folder. Raises UserError if
    the disk is full or too many losses in a row aren't finite, and Interrupted, after a save, if the job
    is preempted.
    """
    step, optimizer = program
    settings, mesh = job.settings, job.mesh
    start = functools.partial(
        split_initial_state, optimizer=optimizer, ema_decay=settings.ema_decay, mesh=mesh
    )
    iterator = batches(
        source,
        batch_size=settings.batch_size // jax.process_count(),
        seed=job.seed,
        flip=flip,
        process_index=process_order(mesh).index(jax.process_index()),
        process_count=jax.process_count(),
    )
    with (
        contextlib.closing(iterator),
        StageCheckpoints(
            job.directory, keep=job.cadence.checkpoints_to_keep, total_steps=job.total_steps
        ) as checkpoints,
    ):
        restored = checkpoints.restore(abstract(jax.eval_shape(start, shapes), mesh))
        unlogged: Sequence[float] = ()
        if restored is None:
            params = initial()
            write_text(job.directory / "parameters.txt", parameter_table(params))
            state = start(params)
            del params
        else:
            state, data_state, _, unlogged = restored
            del restored  # So that the first update can reuse the state's memory.
            iterator.set_state(data_state)
        log = MetricsLog(
            job.directory,
            step=int(state.step),
            unlogged=unlogged,
            writers=further_writers(job, int(state.step)),
        )
        with contextlib.closing(log):
            return train(
                job,
                state,
                step,
                frozen=frozen,
                batches=iterator,
                checkpoints=checkpoints,
                log=log,
            )


def further_writers(job: Job, step: int) -> list[Writer]:
    """Return the writers that a job, which resumes at `step`, adds to those of every log."""
    project = job.monitoring.wandb
    if project is None or not is_first():
        return []
    return [WeightsAndBiases(project, job.directory, about=job.about, step=step)]
