"""Handlers of SIGTERM and Ctrl-C, in place from the program's first line on.

Python runs a signal's handler between two instructions of the main thread. A compilation, which is one
instruction, can delay that for minutes; a separate thread sees the signal at once.
"""

import os
import signal
import threading
import time
from types import FrameType
from typing import NoReturn

from guided_distill.errors import Interrupted

# Nothing here imports a slow module, so that `watch` runs before the program has loaded.

PATIENCE = 5.0
"""Seconds that the main thread gets to end the program by itself."""

STATUSES = {signal.SIGTERM: Interrupted.STATUS, signal.SIGINT: 130}

STOPPED = "stopped; the same command resumes from what is saved"

unsaved = threading.Event()
"""Set while training has updates that no checkpoint contains."""

_finished = threading.Event()


def watch() -> None:
    """Make SIGTERM and Ctrl-C end the program within `PATIENCE` seconds, or after a save if needed.

    A second Ctrl-C ends the program at once, and loses only unsaved updates.
    """
    signal.signal(signal.SIGTERM, _stop)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # A child process must not report its signals to its parent.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_read_signals, args=(reading,), daemon=True).start()


def finish(status: int) -> None:
    """Make a signal that arrives after the work is done exit with the same status."""
    _finished.set()
    for number in STATUSES:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(status))


def say(message: str) -> None:
    """Print a message in a signal handler or a thread, where print isn't safe."""
    os.write(2, f"guided-distill: {message}\n".encode())


def _stop(number: int, _: FrameType | None) -> None:
    _exit(STATUSES[signal.Signals(number)], STOPPED)


def _exit(status: int, message: str) -> NoReturn:
    if not _finished.is_set():
        if os.isatty(2):
            os.write(2, b"\x1b[?25h\n")  # A progress bar hides the cursor.
        say(message)
    os._exit(status)


def _read_signals(reading: int) -> None:
    """Read the numbers of signals as they arrive, and end the program if the main thread doesn't."""
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
                threading.Thread(target=_exit_later, args=(status,), daemon=True).start()
            seen.append(number)


def _exit_later(status: int) -> None:
    """Exit with this status, after the main thread has had time to end the program or to save."""
    time.sleep(PATIENCE)
    if unsaved.is_set():
        say("preempted: saving after the current update or compilation, which can't be interrupted")
        while unsaved.is_set():
            time.sleep(0.1)
        time.sleep(PATIENCE)
    _exit(status, STOPPED)
