"""Where the figures of a stage go: JSON lines always, and TensorBoard events beside them."""

import json
import math
from collections.abc import Mapping
from typing import Any

import tensorboardX
from clu import parameter_overview
from etils import epath

from guided_distill.training.checkpoints import write_text


class MetricsLog:
    """The log of one stage, `metrics.jsonl`, one object a line.

    Opened at the step that a stage resumes from, it forgets what was logged beyond, so that a resumed
    run's log is that of an uninterrupted one. The file is written whole and renamed into place, for
    object stores can't append.
    """

    def __init__(self, directory: epath.Path, *, step: int) -> None:
        self._path = directory / "metrics.jsonl"
        self._rows = [row for row in read_metrics(directory) if row["step"] <= step]
        self._events = tensorboardX.SummaryWriter(
            str(directory / "tensorboard"), purge_step=step + 1
        )

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Log named figures at a step. A figure that isn't finite is left out of the events."""
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        row: dict[str, Any] = {"step": step} | {name: finite.get(name) for name in figures}
        self._rows.append(row)
        write_text(self._path, "".join(f"{json.dumps(row)}\n" for row in self._rows))
        for name, value in finite.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the events."""
        self._events.close()


def read_metrics(directory: epath.Path) -> list[dict[str, Any]]:
    """The rows of a stage's log, oldest first; none where it has no log yet."""
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def parameter_table(params: Mapping) -> str:
    """Name, shape and size of every weight, and their count."""
    return parameter_overview.get_parameter_overview(params, include_stats=False)
