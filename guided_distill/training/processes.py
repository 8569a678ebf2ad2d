"""Many processes that train as one: how they find each other, agree, and share the writing.

With one process, which is the common case, nothing here does anything.
"""

import contextlib
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # Only there does jax tell the address that it found.
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding

from guided_distill.errors import Interrupted, UserError
from guided_distill.training.progress import console

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Environment variables of processes that are started by hand. JAX itself reads the first alone."""

_SLACK = 60
"""Seconds that JAX, which aborts, waits longer than we do, who tell why."""

_FAREWELL = 10
"""Seconds that a process which ends in an error waits for the others to end too."""

_LOST_AFTER = 60
"""Seconds without a sign of life after which a process counts as dead."""

_SIGNS_OF_LOSS = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Barrier")
"""What errors speak of when another process is gone."""


@contextlib.contextmanager
def connected(*, timeout: int) -> Iterator[None]:
    """Join the other processes of this run, if there are any, for the time of the block.

    By hand they are set by `ADDRESS`, `COUNT` and `INDEX`; on TPU pods, GKE, Slurm and with Open MPI
    JAX finds them. timeout: seconds until all have to be there. Raises UserError for variables that don't
    fit together, for a port that is taken, and if the others aren't found; if they don't come, the
    process says so and exits with 2. If another process dies, this one says so and exits with
    Interrupted.STATUS.
    """
    if not jax.distributed.is_initialized():
        _join(timeout)
    console.quiet = not is_first()
    try:
        yield
    except (UserError, Interrupted) as error:
        _leave(error)
        raise
    except Exception as error:
        if jax.process_count() > 1 and any(sign in str(error) for sign in _SIGNS_OF_LOSS):
            said = str(error).splitlines()[0][:200]
            _exit(
                f"process {jax.process_index()} lost another process ({said}): start all of them again "
                f"by the same command",
                Interrupted.STATUS,
            )
        raise


def _join(timeout: int) -> None:
    address, count, index = _by_hand()
    try:
        with _exiting_after(
            timeout, lambda: _not_met(distributed.global_state.coordinator_address, timeout)
        ):
            jax.distributed.initialize(
                coordinator_address=address,
                num_processes=count,
                process_id=index,
                initialization_timeout=timeout + _SLACK,
                heartbeat_timeout_seconds=_LOST_AFTER,
                shutdown_timeout_seconds=_FAREWELL + _SLACK,
            )
    except ValueError as error:
        # Nothing was set, and JAX found nothing: the one process of a machine alone.
        if address is not None or "coordinator_address" not in str(error):
            raise UserError(
                f"JAX can't tell which processes there are ({error}): set {ADDRESS}, {COUNT} and {INDEX}"
            ) from error
    except RuntimeError as error:
        # A session that has used JAX before, such as a notebook, is one process.
        if address is None and "must be called before" in str(error):
            return
        raise UserError(f"{str(error).splitlines()[0]}; {_not_met(address, timeout)}") from error


def _leave(error: UserError | Interrupted) -> None:
    """Part from the others, which have met the same error, or are left waiting for this process."""
    status = Interrupted.STATUS if isinstance(error, Interrupted) else 2
    with _exiting_after(_FAREWELL, lambda: str(error), status):
        jax.distributed.shutdown()


@contextlib.contextmanager
def _exiting_after(seconds: float, message: Callable[[], str], status: int = 2) -> Iterator[None]:
    """End the process if the block takes longer.

    For calls of JAX that can't be interrupted and abort with a stack trace in the end.
    """
    watch = threading.Timer(seconds, lambda: _exit(message(), status))
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


def _exit(message: str, status: int) -> NoReturn:
    os.write(2, f"guided-distill: {message}\n".encode())
    os._exit(status)


def _not_met(address: str | None, timeout: int) -> str:
    return (
        f"the processes didn't all meet at {address or 'the address that JAX found'} within {timeout} s: "
        f"check that each was started, that {ADDRESS} is process 0's host:port for all of them, and that "
        f"no firewall is between; --start_timeout waits longer"
    )


def _by_hand() -> tuple[str | None, int | None, int | None]:
    address, *numbers = (os.environ.get(name) or None for name in (ADDRESS, COUNT, INDEX))
    port = _port(address) if address else 0
    if all(number is None for number in numbers):
        # An address alone: JAX adds the rest where it knows the cluster.
        return address, None, None
    try:
        count, index = (int(number or "") for number in numbers)
    except ValueError:
        count, index = 0, 0
    if address is None or not 0 <= index < count:
        raise UserError(
            f"{ADDRESS}={address or ''}, {COUNT}={numbers[0] or ''} and {INDEX}={numbers[1] or ''} "
            f"don't fit together: give host:port of process 0, how many processes there are, and which "
            f"of them this is, from 0"
        )
    if index == 0:
        _check_free(port)
    return address, count, index


def _port(address: str) -> int:
    found = re.fullmatch(r".+:([0-9]{1,5})", address)
    if found is None or not 1 <= int(found[1]) <= 65535:
        raise UserError(
            f"{ADDRESS} is {address}; give host:port of process 0, with a port from 1 to 65535"
        )
    return int(found[1])


def _check_free(port: int) -> None:
    """Raises UserError if this process, the first, can't listen there, for which JAX would crash."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise UserError(
            f"process 0 can't listen on port {port} ({error.strerror}): choose another by {ADDRESS}, "
            f"the same for all processes"
        ) from error


def is_first() -> bool:
    """Whether this is process 0, which writes what isn't an array."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def process_order(mesh: Mesh) -> list[int]:
    """The processes' indices, as their devices come in the mesh."""
    return list(dict.fromkeys(device.process_index for device in mesh.devices.flat))


def texts_of_all(text: str) -> list[str]:
    """What each process gave, in the order of their indices."""
    if jax.process_count() == 1:
        return [text]
    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(mine.size))
    if not sizes.any():
        return [""] * len(sizes)
    padded = np.pad(mine, (0, int(sizes.max()) - mine.size))
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raises in every process the UserError or Interrupted that any of them meets in the block.

    Else those without it would wait for ever for the one that left. All return at the same time.
    """
    said = ""
    try:
        yield
    except (UserError, Interrupted) as error:
        said = f"{type(error).__name__} {error}"
    for each in texts_of_all(said):
        kind, _, words = each.partition(" ")
        if kind:
            raise Interrupted(words) if kind == Interrupted.__name__ else UserError(words)


def first_alone(work: Callable[[], None]) -> None:
    """Let process 0 do it, and the others wait. Raises everywhere what `together` does."""
    with together():
        if is_first():
            work()


def on_all_processes(values: Any, sharding: Sharding) -> Any:
    """Global arrays of a tree of numpy arrays that every process holds whole."""
    if jax.process_count() == 1:
        return values
    return jax.tree.map(
        lambda each: jax.make_array_from_callback(each.shape, sharding, lambda part: each[part]),
        values,
    )


def to_host(array: jax.Array) -> np.ndarray:
    """The whole of a global array, on every process."""
    return multihost_utils.process_allgather(array, tiled=True)
