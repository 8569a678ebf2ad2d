"""A trace of some updates, for TensorBoard's profiler and for Perfetto."""

import math
import tempfile
from pathlib import Path

import jax
from etils import epath

from guided_distill.errors import UserError
from guided_distill.storage import storing, whole
from guided_distill.training.job import Job
from guided_distill.training.processes import is_first
from guided_distill.training.progress import console


class Trace:
    """The trace that a job asks for, if any; a context manager, which discards an unfinished trace.

    It begins after the first dispatch, for which the step is compiled. Only process 0 traces.
    """

    def __init__(self, job: Job, *, step: int) -> None:
        """step: the number of updates that are already done.

        Raises UserError if fewer updates remain than the job asks to trace.
        """
        self._folder = job.directory / "profile"
        self._updates = job.monitoring.profile or 0
        self._begin: int | None = None
        self._files: tempfile.TemporaryDirectory[str] | None = None
        size = job.cadence.steps_per_dispatch
        first = min(step + size - step % size, job.total_steps)
        self._next: float = first if self._updates else math.inf
        if self._updates > job.total_steps - first:
            raise UserError(
                f"--profile is {self._updates}, but {job.title} has {job.total_steps - first} updates "
                f"left after the first ones, in which the step is compiled: "
                f"{_remedy(job.total_steps - first)}"
            )

    def turns(self, step: int) -> bool:
        """Whether the trace begins or ends at this step, for which its updates must have finished."""
        return step >= self._next

    def turn(self, step: int) -> None:
        """Begin or end the trace. Raises UserError if it can't be written."""
        if self._begin is None:
            self._begin, self._next = step, step + self._updates
            if is_first():
                self._files = tempfile.TemporaryDirectory()
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # Every call of Python would slow the loop down.
                jax.profiler.start_trace(
                    self._files.name, create_perfetto_trace=True, profiler_options=options
                )
            return
        self._next = math.inf
        if self._files is not None:
            jax.profiler.stop_trace()
            (made,) = Path(self._files.name).glob("plugins/profile/*")
            _copy(made, self._folder / "plugins" / "profile" / made.name)
            self._remove()
            console.print(
                f"the trace of updates {self._begin + 1} to {step} is in {self._folder}",
                highlight=False,
                markup=False,
            )

    def _remove(self) -> None:
        if self._files is not None:
            self._files.cleanup()
            self._files = None

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        if self._files is not None:
            jax.profiler.stop_trace()
            self._remove()


def _remedy(left: int) -> str:
    return f"make it at most {left}" if left else "leave it out"


def _copy(made: Path, target: epath.Path) -> None:
    with storing(target), whole(target) as part:
        part.mkdir(parents=True)
        for file in made.iterdir():
            (part / file.name).write_bytes(file.read_bytes())
