"""The speed of training: updates a second, arithmetic, and where the time goes."""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax

from guided_distill.chips import peak_flops
from guided_distill.training.job import Job
from guided_distill.training.step import StepReport, loops_are_unrolled

INPUT, CHECKPOINT, COMPILE, PROFILE = CAUSES = ("input", "checkpoint", "compile", "profile")
"""What the devices stand still for."""


class _Dispatch(NamedTuple):
    """A dispatch that ends at `step`, and the seconds for which the devices stood still before it."""

    step: int
    finish_time: Future[float]
    idle: dict[str, float]


class Speedometer:
    """Measures a job between the rows of its log; a context manager.

    A row's time ends when its dispatch finishes. A thread waits for that, so that the loop doesn't.
    """

    def __init__(self, job: Job, *, step: int) -> None:
        """step: the number of updates that are already done."""
        self._batch_size = job.settings.batch_size
        # The compiler counts the body of a loop once: one update, and one part of its batch.
        self._parts = 1 if loops_are_unrolled(job.mesh) else job.settings.accumulation
        self._peak = peak_flops(job.mesh.devices.flat[0].device_kind)
        self._update_flops: float | None = None
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._last: Future[float] | None = None
        self._unlogged: list[_Dispatch] = []
        self._idle = dict.fromkeys(CAUSES, 0.0)
        self._step, self._start = step, time.monotonic()

    @contextlib.contextmanager
    def spending(self, cause: str) -> Iterator[None]:
        """Count the part of the block in which the devices have nothing to do."""
        start = time.monotonic()
        with jax.profiler.TraceAnnotation(cause):
            yield
        if self._last is None:
            self._idle[cause] += time.monotonic() - start
        elif self._last.done():
            self._idle[cause] += time.monotonic() - max(start, self._last.result())

    def compile(self, program: jax.stages.Lowered) -> None:
        """Compile a program and count its FLOPs. JAX keeps it for the next dispatch."""
        cost = program.compile().cost_analysis()
        if isinstance(cost, dict) and cost.get("flops", 0.0) > 0:
            self._update_flops = cost["flops"] * self._parts

    def dispatched(self, report: StepReport, *, step: int) -> None:
        """Note a dispatch that ends at `step`, before it finishes."""
        self._last = self._thread.submit(_finish_time, report)
        self._unlogged.append(_Dispatch(step, self._last, self._idle))
        self._idle = dict.fromkeys(CAUSES, 0.0)

    def figures(self, step: int) -> dict[str, float]:
        """Return the figures since the last call, at a step whose dispatch has finished.

        Shares are in [0, 1] and sum to 1. FLOPs are per device; the utilization is relative to the
        device's peak in bfloat16. A figure that isn't known is left out.
        """
        dispatches = [each for each in self._unlogged if each.step <= step]
        self._unlogged = self._unlogged[len(dispatches) :]
        end = dispatches[-1].finish_time.result()
        seconds = end - self._start
        rate = (step - self._step) / seconds
        self._step, self._start = step, end
        figures = {"updates_per_second": rate, "examples_per_second": rate * self._batch_size}
        if self._update_flops is not None:
            figures["flops_per_second"] = rate * self._update_flops
            if self._peak is not None:
                figures["flops_utilization"] = rate * self._update_flops / self._peak
        shares = {
            f"{cause}_share": sum(each.idle[cause] for each in dispatches) / seconds
            for cause in CAUSES
        }
        return {**figures, **shares, "goodput": 1.0 - sum(shares.values())}

    def __enter__(self) -> "Speedometer":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=False)


def _finish_time(report: StepReport) -> float:
    jax.block_until_ready(report)
    return time.monotonic()
