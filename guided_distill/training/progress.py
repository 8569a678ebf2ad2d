"""Progress of long tasks: a bar with rate and remaining time, or plain lines if there is no terminal."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0

# In a notebook, rich would otherwise show every line as an output of its own.
console = Console(stderr=True, soft_wrap=True, force_jupyter=False)

Advance = Callable[[int, str], None]
"""advance(done, words): report the total number of units done, and a few words such as the loss."""


@contextmanager
def progress(title: str, *, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
    """Show the progress of `total` units, of which `done` were done before."""
    # A notebook's ! looks like a terminal, but it can't redraw a bar in place.
    in_notebook = "JPY_PARENT_PID" in os.environ
    show = _bar if console.is_terminal and not in_notebook else _lines
    with show(title, total=total, unit=unit, done=done) as advance:
        yield advance


@contextmanager
def _bar(title: str, *, total: int, unit: str, done: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"),
    )
    rate = _rate(unit, done)
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, completed=done, rate="", words="")
        yield lambda now, words: bar.update(task, completed=now, rate=rate(now)[1], words=words)


@contextmanager
def _lines(title: str, *, total: int, unit: str, done: int) -> Iterator[Advance]:
    rate = _rate(unit, done)
    last_line = 0.0

    def advance(now: int, words: str) -> None:
        nonlocal last_line
        if time.monotonic() - last_line < SECONDS_BETWEEN_LINES and now < total:
            return
        last_line = time.monotonic()
        per_second, rate_words = rate(now)
        left = f"{(total - now) / per_second:.0f} s left" if per_second else ""
        parts = [f"{title} {now}/{total} {unit}", rate_words, left, words]
        console.print("  ".join(part for part in parts if part), highlight=False, markup=False)

    yield advance


def _rate(unit: str, done: int) -> Callable[[int], tuple[float, str]]:
    start = time.monotonic()

    def rate(now: int) -> tuple[float, str]:
        per_second = (now - done) / max(time.monotonic() - start, 1e-9)
        return per_second, f"{per_second:.3g} {unit}/s" if now > done else ""

    return rate
