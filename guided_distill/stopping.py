"""The program's end by SIGTERM or Ctrl-C, from its first line on.

Python runs the handler of a signal between two instructions of its main thread. A compile, which is one
instruction, can put that off for minutes; a thread of its own sees the signal at once.
"""

import os
import signal
import threading
import time
from types import FrameType
from typing import NoReturn

from guided_distill.errors import Interrupted

# Nothing here imports what takes long, so that `watch` is there before the program is.

PATIENCE = 5.0
"""Seconds that the main thread has to end in good order."""

STATUSES = {signal.SIGTERM: Interrupted.STATUS, signal.SIGINT: 130}

STOPPED = "stopped; the same command resumes from what is kept"

unsaved = threading.Event()
"""Set while a training has updates that no checkpoint holds."""

_over = threading.Event()


def watch() -> None:
    """End the program within `PATIENCE` seconds of SIGTERM or Ctrl-C, but for a save, whatever it does.

    A second Ctrl-C ends it at once, which loses no more than what is unsaved.
    """
    signal.signal(signal.SIGTERM, _stop)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # A child's signals aren't its parent's.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_see, args=(reading,), daemon=True).start()


def end_by(status: int) -> None:
    """The work is over: a signal that comes now ends the program with this status."""
    _over.set()
    for number in STATUSES:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(status))


def say(words: str) -> None:
    """Print a line of the program's, in a handler or a thread, where print isn't safe."""
    os.write(2, f"guided-distill: {words}\n".encode())


def _stop(number: int, _: FrameType | None) -> None:
    _exit(STATUSES[signal.Signals(number)], STOPPED)


def _exit(status: int, words: str) -> NoReturn:
    if not _over.is_set():
        if os.isatty(2):
            os.write(2, b"\x1b[?25h\n")  # A progress bar hides the cursor.
        say(words)
    os._exit(status)


def _see(reading: int) -> None:
    """Read the numbers of signals as they come."""
    seen: list[int] = []
    while numbers := os.read(reading, 64):
        for number in numbers:
            if number == signal.SIGINT and number in seen:
                _exit(
                    STATUSES[signal.SIGINT],
                    "stopped at once; the same command resumes from the last checkpoint",
                )
            if number in STATUSES and not seen:
                status = STATUSES[signal.Signals(number)]
                threading.Thread(target=_insist, args=(status,), daemon=True).start()
            seen.append(number)


def _insist(status: int) -> None:
    """Let the main thread end, or save and then end; after that, end without it."""
    time.sleep(PATIENCE)
    if unsaved.is_set():
        say("preempted: saves after an update or a compile that can't be interrupted")
        while unsaved.is_set():
            time.sleep(0.1)
        time.sleep(PATIENCE)
    _exit(status, STOPPED)
