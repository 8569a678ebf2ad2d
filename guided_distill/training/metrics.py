"""The log of a stage's metrics, as JSON lines and as TensorBoard events."""

import contextlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from clu import parameter_overview
from etils import epath
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from guided_distill.storage import storage_error, write_text
from guided_distill.training.processes import is_first
from guided_distill.training.record import read_metrics


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


class MetricsLog:
    """The log of one stage: `metrics.jsonl`, with one object per line, and TensorBoard events.

    When a stage resumes from `step`, the log drops all later rows, so that a resumed run's log equals
    that of an uninterrupted one. The file is rewritten and renamed into place, because object stores
    can't append. Only process 0 writes. unlogged: the sums of metrics that weren't logged before a
    preemption, from the checkpoint.
    """

    def __init__(self, directory: epath.Path, *, step: int, unlogged: Sequence[float] = ()) -> None:
        self.unlogged = unlogged
        self._path = directory / "metrics.jsonl"
        self._rows = [row for row in read_metrics(directory) if row["step"] <= step]
        self._events = EventFile(directory / "tensorboard", str(step)) if is_first() else None
        if self._events is not None:
            # Makes TensorBoard drop all later steps.
            start = SessionLog(status=SessionLog.START)
            self._events.add(Event(step=step + 1, session_log=start))

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Log named metrics at a step. Values that aren't finite are null, and left out of the events."""
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        row: dict[str, Any] = {"step": step} | {name: finite.get(name) for name in figures}
        self._rows.append(row)
        write_text(self._path, "".join(f"{json.dumps(row)}\n" for row in self._rows))
        if self._events is not None:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in finite.items()]
            self._events.add(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Close the event file. All logged metrics are already on disk."""
        if self._events is not None:
            self._events.close()


def parameter_table(params: Mapping) -> str:
    """Return a table of the name, shape and size of every weight, and the total count."""
    return parameter_overview.get_parameter_overview(params, include_stats=False)
