"""The notice to end: by SIGTERM, the notice that this machine will be taken away, or by Ctrl-C.

Anything but a training stops at once. A training asks for the notice after each dispatch. In a run of
many processes it hands the signal to JAX, which tells all of them, and chooses the dispatch after which
they stop, the same for all.
"""

import contextlib
import ctypes
import functools
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

from guided_distill import stopping
from guided_distill.errors import Interrupted

Handler = Callable[[int, FrameType | None], None]

_preempted = threading.Event()
_by_hand = threading.Event()
_dispatches = itertools.count()


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """SIGTERM raises Interrupted in the block, but where `notices` takes it."""

    def stop(*_: int | FrameType | None) -> None:
        # Remembered too: libraries can lose what is raised.
        _preempted.set()
        raise Interrupted(stopping.STOPPED)

    with _handling(signal.SIGTERM, stop), _sent_again():
        yield


@contextlib.contextmanager
def _sent_again() -> Iterator[None]:
    """Sends the signal once more if what it raised is lost, as in a callback of the interpreter's own."""
    report = sys.unraisablehook

    def lost(error: "sys.UnraisableHookArgs") -> None:
        if issubclass(error.exc_type, Interrupted):
            threading.Timer(0.1, send).start()
        else:
            report(error)

    def send() -> None:
        if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            os.kill(os.getpid(), signal.SIGTERM)  # Which wakes the main thread.

    sys.unraisablehook = lost
    try:
        yield
    finally:
        sys.unraisablehook = report


@contextlib.contextmanager
def notices() -> Iterator[Callable[[], bool]]:
    """Yields what every process asks after each dispatch: whether all are to save now, and end.

    Once it was asked, the training counts as unsaved until the block ends. Raises as `ending` after the
    block for a signal that nobody asked for in time.
    """
    together = jax.distributed.is_initialized()
    tell = _handler_of_jax() if together else lambda _: _preempted.set()

    def note(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            if _by_hand.is_set():
                raise KeyboardInterrupt
            _by_hand.set()
            stopping.say("saves after this update, then stops; Ctrl-C again stops at once")
        tell(signal.SIGTERM)

    def asked() -> bool:
        stopping.unsaved.set()
        if together:
            # Counted over all stages: JAX wants numbers that grow one by one.
            return multihost_utils.reached_preemption_sync_point(next(_dispatches))
        return _preempted.is_set()

    with _handling(signal.SIGTERM, note), _handling(signal.SIGINT, note):
        try:
            yield asked
        finally:
            stopping.unsaved.clear()
        if not together and _preempted.is_set():
            raise ending(stopping.STOPPED)


def ending(words: str) -> BaseException:
    """What to raise when all is saved: KeyboardInterrupt if it was Ctrl-C, else Interrupted."""
    return KeyboardInterrupt(words) if _by_hand.is_set() else Interrupted(words)


@functools.cache
def _handler_of_jax() -> Callable[[int], None]:
    """The handler that JAX has set, which Python can't see. To be asked before Python sets one."""
    exchange = ctypes.CDLL(None).signal
    exchange.argtypes, exchange.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(exchange(signal.SIGTERM, None))


@contextlib.contextmanager
def _handling(number: int, handler: Handler) -> Iterator[None]:
    before = signal.getsignal(number)
    ignored = number == signal.SIGINT and before in (signal.SIG_IGN, None)
    if threading.current_thread() is not threading.main_thread() or ignored:
        # Python gives signals to the main thread alone.
        yield
        return
    if jax.distributed.is_initialized():
        _handler_of_jax()
    signal.signal(number, handler)
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        _preempted.clear()
        _by_hand.clear()
        raise
    finally:
        signal.signal(number, before)
