"""Preemption: SIGTERM, the notice that this machine will be taken away, or Ctrl-C.

Everything but training stops at once. Training checks for a signal after each dispatch. If there are
several processes, the signal is forwarded to JAX, which notifies all of them and chooses the dispatch
after which they all stop.
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
_ctrl_c = threading.Event()
_dispatches = itertools.count()


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """Make SIGTERM raise Interrupted in the block, except inside `notices`."""

    def stop(*_: int | FrameType | None) -> None:
        # Also set a flag, because libraries can lose the exception.
        _preempted.set()
        raise Interrupted(stopping.STOPPED)

    with _handling(signal.SIGTERM, stop), _sent_again():
        yield


@contextlib.contextmanager
def _sent_again() -> Iterator[None]:
    """Send the signal again if its exception is lost, as in a callback of the interpreter."""
    report = sys.unraisablehook

    def lost(error: "sys.UnraisableHookArgs") -> None:
        if issubclass(error.exc_type, Interrupted):
            threading.Timer(0.1, send).start()
        else:
            report(error)

    def send() -> None:
        if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            os.kill(os.getpid(), signal.SIGTERM)  # Wakes the main thread.

    sys.unraisablehook = lost
    try:
        yield
    finally:
        sys.unraisablehook = report


@contextlib.contextmanager
def notices() -> Iterator[Callable[[], bool]]:
    """Yield a function to call after each dispatch, on all processes: whether to save now and stop.

    After its first call, training counts as unsaved until the block ends. Raises `stop_error` after the
    block for a signal that arrived after the last call.
    """
    together = jax.distributed.is_initialized()
    forward = _handler_of_jax() if together else lambda _: _preempted.set()

    def note(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            if _ctrl_c.is_set():
                raise KeyboardInterrupt
            _ctrl_c.set()
            stopping.say("saving after this update, then stopping; Ctrl-C again stops at once")
        forward(signal.SIGTERM)

    def stop_requested() -> bool:
        stopping.unsaved.set()
        if together:
            # Counted over all stages, because JAX expects consecutive numbers.
            return multihost_utils.reached_preemption_sync_point(next(_dispatches))
        return _preempted.is_set()

    with _handling(signal.SIGTERM, note), _handling(signal.SIGINT, note):
        try:
            yield stop_requested
        finally:
            stopping.unsaved.clear()
        if not together and _preempted.is_set():
            raise stop_error(stopping.STOPPED)


def stop_error(message: str) -> BaseException:
    """Return the exception to raise after a save: KeyboardInterrupt after Ctrl-C, else Interrupted."""
    return KeyboardInterrupt(message) if _ctrl_c.is_set() else Interrupted(message)


@functools.cache
def _handler_of_jax() -> Callable[[int], None]:
    """Return JAX's signal handler, which Python can't see. Call this before Python sets a handler."""
    exchange = ctypes.CDLL(None).signal
    exchange.argtypes, exchange.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(exchange(signal.SIGTERM, None))


@contextlib.contextmanager
def _handling(number: int, handler: Handler) -> Iterator[None]:
    before = signal.getsignal(number)
    ignored = number == signal.SIGINT and before in (signal.SIG_IGN, None)
    if threading.current_thread() is not threading.main_thread() or ignored:
        # Only the main thread can set signal handlers.
        yield
        return
    if jax.distributed.is_initialized():
        _handler_of_jax()
    signal.signal(number, handler)
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        _preempted.clear()
        _ctrl_c.clear()
        raise
    finally:
        signal.signal(number, before)
