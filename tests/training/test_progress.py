import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from guided_distill.training import progress as module


class Clock:
    """Time that passes only when told."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def show(monkeypatch, *, terminal):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=150, soft_wrap=True)
    monkeypatch.setattr(module, "console", console)
    return file


def test_plain_lines_tell_place_rate_time_left_and_words(monkeypatch, clock):
    file = show(monkeypatch, terminal=False)
    with module.progress("[1/4] teacher", total=100, unit="steps") as advance:
        clock.now += 20.0
        advance(40, "loss 0.5")
    assert file.getvalue() == "[1/4] teacher 40/100 steps  2 steps/s  30 s left  loss 0.5\n"


def test_rate_counts_only_the_work_of_this_call(monkeypatch, clock):
    file = show(monkeypatch, terminal=False)
    with module.progress("stage", total=100, unit="steps", done=60) as advance:
        clock.now += 10.0
        advance(80, "")
    assert "80/100 steps  2 steps/s  10 s left" in file.getvalue()


def test_lines_are_spaced_in_time_and_the_last_is_never_left_out(monkeypatch, clock):
    file = show(monkeypatch, terminal=False)
    with module.progress("stage", total=100, unit="steps") as advance:
        for now in range(1, 101):
            clock.now += 0.5
            advance(now, "")
    places = [int(line.split()[1].split("/")[0]) for line in file.getvalue().splitlines()]
    assert places == [1, 21, 41, 61, 81, 100]


def test_lines_hold_no_control_characters(monkeypatch, clock):
    file = show(monkeypatch, terminal=False)
    with module.progress("[bold] title", total=2, unit="rows") as advance:
        advance(1, "[red] words")
    assert "\x1b" not in file.getvalue()
    assert "[bold] title" in file.getvalue()
    assert "[red] words" in file.getvalue()


def test_a_terminal_shows_a_bar_with_rate_and_time_left(monkeypatch, clock):
    file = show(monkeypatch, terminal=True)
    with module.progress("[1/4] teacher", total=100, unit="steps", done=10) as advance:
        clock.now += 15.0
        advance(40, "loss 0.5")
    text = file.getvalue()
    assert "\x1b[" in text
    assert "━" in text
    for part in ("[1/4] teacher", "40%", "2 steps/s", ":", "loss 0.5"):
        assert part in text
