"""The rule for every hostile input: it is read correctly, or refused in one sentence with status 2."""

import contextlib
import io
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guided_distill import cli
from guided_distill.errors import UserError

SECONDS = 30
"""The time that an input may take, on a busy machine."""

BYTES = 1 << 30
"""The memory that an input may add to the process."""


class Begun(BaseException):
    """The input is accepted: training, compiling or downloading would begin here."""


def begin(*_: Any, **__: Any) -> None:
    raise Begun


class TooLong(BaseException):
    """The input hangs."""


@dataclass(frozen=True)
class Refusal:
    sentence: str


@dataclass(frozen=True)
class Case:
    """A source of draws, and an empty folder to write to."""

    rng: random.Random
    folder: Path

    def kind(self, kinds: Mapping[str, Any]) -> Any:
        """Choose one of some named things; print its name, to identify a failing test."""
        name = self.rng.choice(sorted(kinds))
        print(f"kind: {name}")
        return kinds[name]


def attempt(read: Callable[[], Any]) -> Any:
    """Return what `read` returns, or a Refusal for its UserError; any other exception is a failure."""
    try:
        with _bounded():
            return read()
    except UserError as error:
        # The command line prints the error on one line.
        return _refusal(" ".join(str(error).split()))


def command(arguments: Sequence[str]) -> str | Refusal:
    """Return the output of a command line, or the Refusal that it ends with."""
    print("guided-distill", *map(repr, arguments))
    out, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said), _bounded():
        try:
            status: Any = cli.main(arguments)
        except SystemExit as ended:  # Raised by argparse.
            status = ended.code
        except Begun:
            status = 0
    assert "Traceback" not in said.getvalue(), said.getvalue()
    assert status in (0, 2), f"status {status}: {said.getvalue()}"
    if status == 0:
        return out.getvalue()
    last = said.getvalue().rstrip("\n").rpartition("\n")[2]
    program, _, sentence = last.partition(": ")
    assert program.startswith("guided-distill"), said.getvalue()
    return _refusal(sentence)


def _refusal(sentence: str) -> Refusal:
    print("refused:", sentence)
    assert len(sentence.splitlines()) == 1, sentence
    return Refusal(sentence)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLong(f"more than {SECONDS} seconds")

    limits = resource.getrlimit(resource.RLIMIT_DATA)
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (_data_size() + BYTES, limits[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def _data_size() -> int:
    """The bytes of this process that RLIMIT_DATA counts."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmData" in x)
    return 1024 * int(line.split()[1])
