"""Progress of long tasks: lines in a log file, a bar in a terminal."""

import io
import runpy

import pytest
from rich.console import Console

from guided_distill.training import progress


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def use_console(monkeypatch, terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200, soft_wrap=True)
    monkeypatch.setattr(progress, "console", console)
    return out


def test_lines_show_rate_and_time_left(monkeypatch, clock):
    out = use_console(monkeypatch, terminal=False)
    with progress.progress("[teacher]", total=100, unit="steps", done=40) as advance:
        for seconds, now in ((10, 60), (5, 70), (6, 80), (1, 100)):
            clock.now += seconds
            advance(now, f"loss {now}")
    assert out.getvalue().splitlines() == [
        "[teacher] 60/100 steps  2 steps/s  20 s left  loss 60",
        "[teacher] 80/100 steps  1.9 steps/s  10 s left  loss 80",
        "[teacher] 100/100 steps  2.73 steps/s  0 s left  loss 100",
    ]


def test_a_resumed_stage_with_nothing_done_has_no_rate_yet(monkeypatch, clock):
    out = use_console(monkeypatch, terminal=False)
    with progress.progress("x", total=100, unit="steps", done=40) as advance:
        clock.now += 1
        advance(40, "")
    assert out.getvalue() == "x 40/100 steps\n"


def test_a_notebook_gets_lines(monkeypatch, clock):
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    out = use_console(monkeypatch, terminal=True)
    with progress.progress("x", total=100, unit="steps") as advance:
        clock.now += 10
        advance(100, "")
    assert out.getvalue() == "x 100/100 steps  10 steps/s  0 s left\n"


def test_lines_of_a_notebook_are_one_text(monkeypatch):
    class ZMQInteractiveShell:
        """By its name, rich recognizes a notebook."""

    monkeypatch.setattr("rich.console.get_ipython", ZMQInteractiveShell, raising=False)
    assert Console().is_jupyter
    assert not runpy.run_path(progress.__file__)["console"].is_jupyter


def test_a_terminal_gets_a_bar_with_the_rate(monkeypatch, clock):
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    out = use_console(monkeypatch, terminal=True)
    with progress.progress("[1/4] teacher", total=100, unit="steps") as advance:
        clock.now += 10
        advance(50, "loss 2")
    shown = out.getvalue()
    for part in ("[1/4] teacher", "50%", "5 steps/s", "loss 2"):
        assert part in shown
