"""Pre-emption: the notice that this machine will be taken away, which is SIGTERM.

Anything but a training stops at once. A training asks for the notice after each dispatch. In a run of
many processes it hands the signal to JAX, which tells all of them, and chooses the dispatch after which
they stop, the same for all.
"""

import contextlib
import ctypes
import functools
import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

from guided_distill.errors import Interrupted

_told = threading.Event()
_dispatches = itertools.count()


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """SIGTERM raises Interrupted in the block, but where `notices` takes it."""

    def stop(*_: int | FrameType | None) -> None:
        # Remembered too: libraries can lose what is raised.
        _told.set()
        raise Interrupted("stopped; the same command goes on from what is kept")

    with _handling(stop), _told_again():
        yield


@contextlib.contextmanager
def _told_again() -> Iterator[None]:
    """Sends the signal once more if what it raised is lost, as in a callback of the interpreter's own."""
    report = sys.unraisablehook

    def lost(error: "sys.UnraisableHookArgs") -> None:
        if issubclass(error.exc_type, Interrupted):
            threading.Timer(0.1, send).start()
        else:
            report(error)

    def send() -> None:
        if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            signal.raise_signal(signal.SIGTERM)

    sys.unraisablehook = lost
    try:
        yield
    finally:
        sys.unraisablehook = report


@contextlib.contextmanager
def notices() -> Iterator[Callable[[], bool]]:
    """Yields what every process asks after each dispatch: whether all are to save now, and end."""
    if jax.distributed.is_initialized():
        tell = _handler_of_jax()
        with _handling(lambda *_: tell(signal.SIGTERM)):
            # Counted over all stages: JAX wants numbers that grow one by one.
            yield lambda: multihost_utils.reached_preemption_sync_point(next(_dispatches))
        return
    with _handling(lambda *_: _told.set()):
        yield _told.is_set


@functools.cache
def _handler_of_jax() -> Callable[[int], None]:
    """The handler that JAX has set, which Python can't see. To be asked before Python sets one."""
    exchange = ctypes.CDLL(None).signal
    exchange.argtypes, exchange.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(exchange(signal.SIGTERM, None))


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        # Python gives signals to the main thread alone.
        yield
        return
    if jax.distributed.is_initialized():
        _handler_of_jax()
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    except Interrupted:
        _told.clear()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
