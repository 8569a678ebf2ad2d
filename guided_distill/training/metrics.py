"""The log of a stage's metrics, as JSON lines and as TensorBoard events."""

import contextlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from clu import parameter_overview
from etils import epath
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from guided_distill.storage import storage_error, write_text
from guided_distill.training.processes import is_first
from guided_distill.training.record import METRICS, SPEED, read_rows

Figures = Mapping[str, float | None]


class EventFile:
    """A TensorBoard event file in a folder; every event is on disk as soon as it is added.

    Raises UserError if it can't be written.
    """

    # tensorboardX's SummaryWriter writes in a thread, from which a full disk can't be reported.
    def __init__(self, folder: epath.Path, suffix: str) -> None:
        """suffix: the end of the file's name, after the time."""
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{int(time.time())}.{suffix}"
            self._records = RecordWriter(str(folder / name))
        except OSError as error:
            raise storage_error(folder, error) from error
        self.add(Event(file_version="brain.Event:2"))

    def add(self, event: Event) -> None:
        """Write an event with the current time."""
        event.wall_time = time.time()
        try:
            self._records.write(event.SerializeToString())
            self._records.flush()
        except OSError as error:
            self.close()
            raise storage_error(self._folder, error) from error

    def close(self) -> None:
        """Close the file. All added events are already on disk."""
        with contextlib.suppress(OSError):
            self._records.close()


class Writer(Protocol):
    """A form of a stage's log. Values that aren't finite have been replaced by None."""

    def write(self, step: int, metrics: Figures, *, speed: Figures) -> None:
        """Write a row: the metrics of the loss, which a resumed run repeats, and the speed."""
        ...

    def close(self) -> None:
        """Release what the writer holds; the rows are already written."""
        ...


class JsonLines:
    """`metrics.jsonl` and `speed.jsonl`, with one object per line.

    The files are rewritten and renamed into place, because object stores can't append.
    """

    def __init__(self, directory: epath.Path, *, step: int) -> None:
        """step: of the checkpoint from which the stage resumes; later rows are dropped."""
        self._files = {
            directory / name: [row for row in read_rows(directory / name) if row["step"] <= step]
            for name in (METRICS, SPEED)
        }

    def write(self, step: int, metrics: Figures, *, speed: Figures) -> None:
        """See `Writer`."""
        for (path, rows), figures in zip(self._files.items(), (metrics, speed), strict=True):
            rows.append({"step": step, **figures})
            write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))

    def close(self) -> None:
        """See `Writer`."""


class TensorBoard:
    """Events for TensorBoard, without the values that aren't finite."""

    def __init__(self, folder: epath.Path, *, step: int) -> None:
        self._events = EventFile(folder, str(step))
        # Makes TensorBoard drop all later steps.
        start = SessionLog(status=SessionLog.START)
        self._events.add(Event(step=step + 1, session_log=start))

    def write(self, step: int, metrics: Figures, *, speed: Figures) -> None:
        """See `Writer`."""
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in by_tag(metrics, speed).items()
            if value is not None
        ]
        self._events.add(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """See `Writer`."""
        self._events.close()


def by_tag(metrics: Figures, speed: Figures) -> Figures:
    """Return all figures of a row, each under the tag that charts show."""
    return {**metrics, **{f"speed/{name}": value for name, value in speed.items()}}


class MetricsLog:
    """The log of one stage: JSON lines, TensorBoard events, and further writers.

    When a stage resumes from `step`, the log drops all later rows, so that the metrics of a resumed run
    equal those of an uninterrupted one. Only process 0 writes. unlogged: the sums of metrics that weren't
    logged before a preemption, from the checkpoint.
    """

    def __init__(
        self,
        directory: epath.Path,
        *,
        step: int,
        unlogged: Sequence[float] = (),
        writers: Sequence[Writer] = (),
    ) -> None:
        self.unlogged = unlogged
        self._writers = [JsonLines(directory, step=step), *writers]
        if is_first():
            self._writers.append(TensorBoard(directory / "tensorboard", step=step))

    def write(self, step: int, metrics: Mapping[str, float], *, speed: Mapping[str, float]) -> None:
        """Log named figures at a step. Values that aren't finite are null."""
        row, speed_row = _finite(metrics), _finite(speed)
        for writer in self._writers:
            writer.write(step, row, speed=speed_row)

    def close(self) -> None:
        """Close all writers. All logged figures are already written."""
        for writer in self._writers:
            writer.close()


def rows_until(directory: epath.Path, step: int) -> list[tuple[int, Figures, Figures]]:
    """Return the rows of a stage's log up to a step: the step, the metrics and the speed of each."""
    speeds = {row.pop("step"): row for row in read_rows(directory / SPEED)}
    rows = [(row.pop("step"), row) for row in read_rows(directory / METRICS)]
    return [(at, metrics, speeds.get(at, {})) for at, metrics in rows if at <= step]


def _finite(figures: Mapping[str, float]) -> Figures:
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def parameter_table(params: Mapping) -> str:
    """Return a table of the name, shape and size of every weight, and the total count."""
    return parameter_overview.get_parameter_overview(params, include_stats=False)
