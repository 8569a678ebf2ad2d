"""The training loop, the same for every stage."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import clu.metrics
import jax
import numpy as np
from jax.sharding import NamedSharding

from guided_distill.errors import UserError
from guided_distill.training.checkpoints import StageCheckpoints
from guided_distill.training.job import Job
from guided_distill.training.mesh import replicated, split_batch
from guided_distill.training.metrics import MetricsLog
from guided_distill.training.preemption import notices, stop_error
from guided_distill.training.progress import progress
from guided_distill.training.speed import CHECKPOINT, COMPILE, INPUT, PROFILE, Speedometer
from guided_distill.training.state import TrainState
from guided_distill.training.step import StepReport, TrainStep
from guided_distill.training.trace import Trace


class Batches(Protocol):
    """An endless iterator over batches whose position can be saved."""

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]: ...
    def __next__(self) -> Mapping[str, np.ndarray]: ...
    def get_state(self) -> Any:
        """Return the position, as JSON-serializable data."""
        ...


def train(
    job: Job,
    state: TrainState,
    step: TrainStep,
    *,
    frozen: Any,
    batches: Batches,
    checkpoints: StageCheckpoints,
    log: MetricsLog,
) -> TrainState:
    """Train from the state's step to the job's last step, with checkpoints and logs; return the state.

    Each dispatch, or call of `step`, makes cadence.steps_per_dispatch updates and ends at a multiple of
    that number, so a resumed run makes the same calls as an uninterrupted one. The loop reads the metrics
    of a dispatch while the next one runs. `batches` yields this process's part of each batch. Raises
    UserError if cadence.max_nonfinite_steps updates in a row were skipped. After SIGTERM or Ctrl-C, saves
    the state and raises `stop_error`.
    """
    cadence, title, total_steps = job.cadence, job.title, job.total_steps
    now, size = int(state.step), cadence.steps_per_dispatch
    sharding = split_batch(job.mesh, axis=1)
    # A program does this because device_put can't put keys on the devices of other processes.
    key = jax.jit(lambda key: key, out_shardings=replicated(job.mesh))(job.key)
    sums: clu.metrics.Collection | None = None
    unlogged = log.unlogged
    unread: tuple[int, StepReport] | None = None
    compiled: set[int] = set()
    with (
        progress(title, total=total_steps, unit="steps", done=now) as advance,
        notices() as preempted,
        Speedometer(job, step=now) as speed,
        Trace(job, step=now) as trace,
    ):

        def read(done: int, report: StepReport) -> None:
            """Wait for a dispatch, check it, and log its metrics."""
            nonlocal sums
            report = jax.device_get(report)
            in_a_row = int(report.skipped_in_a_row)
            if in_a_row >= min(cadence.max_nonfinite_steps, total_steps):
                raise UserError(
                    f"{title}: the loss was not finite for {in_a_row} updates in a row before step "
                    f"{done}: start again in another --workdir with a lower learning_rate for this "
                    f"stage and, if an earlier stage is finished, --config.start_from=WORKDIR/STAGE"
                )
            sums = report.metrics if sums is None else sums.merge(report.metrics)
            if done % cadence.log_every == 0 or done == total_steps:
                with np.errstate(invalid="ignore"):  # Without finite updates, the average is 0/0.
                    figures = {name: float(value) for name, value in sums.compute().items()}
                figures["skipped"] = int(report.skipped)
                log.write(done, figures, speed=speed.figures(done))
                sums = None
                advance(done, f"loss {figures['loss']:.4g}")

        while now < total_steps:
            count = min(size - now % size, total_steps - now)
            with speed.spending(INPUT):
                stacked = _stack([next(batches) for _ in range(count)])
                batch = _on_devices(stacked, sharding)
            if count not in compiled:
                compiled.add(count)
                with speed.spending(COMPILE):
                    speed.compile(step.lower(state, frozen, batch, key))
            with jax.profiler.StepTraceAnnotation("train", step_num=now):
                state, report = step(state, frozen, batch, key)
            if sums is None and unlogged:
                sums = _like(report.metrics, unlogged)
                unlogged = ()
            if unread:
                read(*unread)
            now += count
            speed.dispatched(report, step=now)
            unread = (now, report)
            ends = preempted()
            saves = ends or now % cadence.checkpoint_every == 0 or now == total_steps
            if saves or trace.turns(now):
                read(*unread)
                unread = None
            if trace.turns(now):
                with speed.spending(PROFILE):
                    trace.turn(now)
            if saves:
                with speed.spending(CHECKPOINT):
                    checkpoints.save(
                        state,
                        data_state=batches.get_state(),
                        about=job.about,
                        unlogged=[float(each) for each in jax.tree.leaves(sums)],
                    )
            if ends:
                checkpoints.wait()
                raise stop_error(
                    f"{title}: preempted, and saved at step {now}; the same command resumes"
                )
        checkpoints.wait()
    return state


def _on_devices(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Return the global batch; `batch` is this process's part."""
    return {
        name: jax.make_array_from_process_local_data(sharding, each) for name, each in batch.items()
    }


def _like(sums: clu.metrics.Collection, values: Sequence[float]) -> clu.metrics.Collection:
    """Return a collection with the structure of `sums` and these values."""
    leaves, structure = jax.tree.flatten(sums)
    same = [np.asarray(value, leaf.dtype) for value, leaf in zip(values, leaves, strict=True)]
    return jax.tree.unflatten(structure, same)


def _stack(batches: list[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
