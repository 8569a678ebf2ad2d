"""What a stage's folder records, read without opening its checkpoints and without JAX."""

import hashlib
import json
from typing import Any

from etils import epath

from guided_distill.errors import UserError
from guided_distill.storage import is_there

METRICS, SPEED = "metrics.jsonl", "speed.jsonl"
"""The files of a stage's log."""


def latest_step(directory: epath.Path) -> int | None:
    """Return the step of the newest checkpoint in a stage's folder, or None, without opening it.

    Raises UserError if the folder can't be reached.
    """
    folder = directory / "checkpoints"
    steps = (
        [int(each.name) for each in folder.iterdir() if each.name.isdigit()]
        if is_there(folder)
        else []
    )
    return max(steps, default=None)


def checkpoint_id(directory: epath.Path) -> str:
    """Return 8 hex digits that identify the newest checkpoint, even among runs of the same config.

    They come from Orbax's metadata about when and what it saved, so a copy of the folder has the same.
    """
    step = latest_step(directory)
    note = directory / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
    return hashlib.sha256(note.read_bytes() if note.exists() else b"").hexdigest()[:8]


def read_metrics(directory: epath.Path) -> list[dict[str, Any]]:
    """Return the rows of a stage's log, oldest first; an empty list if it has no log yet.

    Skips a truncated last line. Raises UserError for any other damaged line.
    """
    return read_rows(directory / METRICS)


def read_speed(directory: epath.Path) -> list[dict[str, Any]]:
    """Return the rows of a stage's speed, like `read_metrics`."""
    return read_rows(directory / SPEED)


def read_rows(path: epath.Path) -> list[dict[str, Any]]:
    """Return the rows of one file of a log, like `read_metrics`."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    while lines and not lines[-1].strip():
        lines.pop()
    rows = [_row(line) for line in lines]
    if rows and rows[-1] is None:
        rows.pop()
    whole = [row for row in rows if row is not None]
    if len(whole) < len(rows):
        raise UserError(
            f"{path}, line {rows.index(None) + 1}, is damaged: remove the line, or the file if you don't "
            f"need the log"
        )
    return whole


def _row(line: bytes) -> dict[str, Any] | None:
    """Return the row of a line, or None if the line isn't a valid row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return row if all(value is None or _is_figure(value) for value in row.values()) else None


def _is_figure(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)
