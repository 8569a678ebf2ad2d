"""Pre-emption: the notice that this machine will be taken away, which is SIGTERM.

A training asks for it after each dispatch. In a run of many processes JAX takes the signal, tells all of
them, and chooses the dispatch after which they stop, the same for all.
"""

import contextlib
import itertools
import signal
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
        # Remembered too: what is raised in a callback of the interpreter's own is lost.
        _told.set()
        raise Interrupted("stopped; the same command goes on from what is kept")

    with _handling(stop):
        yield


@contextlib.contextmanager
def notices() -> Iterator[Callable[[], bool]]:
    """Yields what every process asks after each dispatch: whether all are to save now, and end."""
    if jax.distributed.is_initialized():
        # Counted over all stages: JAX wants numbers that grow one by one.
        yield lambda: multihost_utils.reached_preemption_sync_point(next(_dispatches))
        return
    with _handling(lambda *_: _told.set()):
        yield _told.is_set


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if (
        jax.distributed.is_initialized()
        or threading.current_thread() is not threading.main_thread()
    ):
        # JAX has taken the signal; and Python gives signals to the main thread alone.
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    except Interrupted:
        _told.clear()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
