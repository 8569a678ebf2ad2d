"""Several processes that train together: how they connect, agree on errors, and divide the writing.

With a single process, the common case, these functions do nothing special.
"""

import contextlib
import inspect
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # The only place where JAX exposes the address that it detected.
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding

from guided_distill.errors import Interrupted, UserError
from guided_distill.training.progress import console

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Environment variables of processes that are started by hand. JAX itself reads only the first one."""

_MARGIN = 60
"""Seconds that JAX, which aborts, waits longer than our own time-outs, which report the reason."""

_SHUTDOWN = 10
"""Seconds that a process which ends with an error waits for the others to end too."""

_LOST_AFTER = 60
"""Seconds without a heartbeat after which a process counts as dead."""

_LOST_PROCESS = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Barrier")
"""Words in error messages that mean that another process is gone."""


@contextlib.contextmanager
def connected(*, timeout: int) -> Iterator[None]:
    """Connect to the other processes of this run, if there are any, while the block runs.

    `ADDRESS`, `COUNT` and `INDEX` describe processes started by hand; on TPU pods, on GKE, under Slurm
    and
    with Open MPI, JAX detects them. timeout: seconds until all must have connected. Raises UserError if
    the variables are inconsistent, the port is taken, or JAX can't detect the processes. If the others
    don't connect in time, prints the reason and exits with status 2. If another process dies, prints so
    and exits with Interrupted.STATUS.
    """
    if not jax.distributed.is_initialized():
        _connect(timeout)
    console.quiet = not is_first()
    try:
        yield
    except (UserError, Interrupted) as error:
        _disconnect(error)
        raise
    except Exception as error:
        if jax.process_count() > 1 and any(sign in str(error) for sign in _LOST_PROCESS):
            reason = str(error).splitlines()[0][:200]
            _exit(
                f"process {jax.process_index()} lost another process ({reason}): start all of them again "
                f"with the same command",
                Interrupted.STATUS,
            )
        raise


def _connect(timeout: int) -> None:
    address, count, index = _from_environment()
    try:
        with _exiting_after(
            timeout, lambda: _not_connected(distributed.global_state.coordinator_address, timeout)
        ):
            jax.distributed.initialize(
                coordinator_address=address,
                num_processes=count,
                process_id=index,
                initialization_timeout=timeout + _MARGIN,
                heartbeat_timeout_seconds=_LOST_AFTER,
                **_shutdown_timeout(),
            )
    except ValueError as error:
        # No variable is set, and JAX detected no cluster: there is a single process.
        if address is not None or "coordinator_address" not in str(error):
            raise UserError(
                f"JAX can't detect the processes ({error}): set {ADDRESS}, {COUNT} and {INDEX}"
            ) from error
    except RuntimeError as error:
        # A session that has already used JAX, such as a notebook, is a single process.
        if address is None and "must be called before" in str(error):
            return
        raise UserError(
            f"{str(error).splitlines()[0]}; {_not_connected(address, timeout)}"
        ) from error


def _shutdown_timeout() -> dict[str, Any]:
    # JAX 0.7 doesn't have it: a process that ends normally waits for the others for up to five minutes.
    name = "shutdown_timeout_seconds"
    has_it = name in inspect.signature(jax.distributed.initialize).parameters
    return {name: _SHUTDOWN + _MARGIN} if has_it else {}


def _disconnect(error: UserError | Interrupted) -> None:
    """Disconnect from the others, which either met the same error or are waiting for this process."""
    status = Interrupted.STATUS if isinstance(error, Interrupted) else 2
    with _exiting_after(_SHUTDOWN, lambda: str(error), status):
        jax.distributed.shutdown()


@contextlib.contextmanager
def _exiting_after(seconds: float, message: Callable[[], str], status: int = 2) -> Iterator[None]:
    """Exit the process with a message if the block takes longer than `seconds`.

    For calls of JAX that can't be interrupted and that eventually abort with a stack trace.
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


def _not_connected(address: str | None, timeout: int) -> str:
    return (
        f"the processes didn't all connect to {address or 'the address that JAX detected'} within "
        f"{timeout} s: check that each was started, that {ADDRESS} is process 0's host:port for all of "
        f"them, and that no firewall blocks it, or set a longer --start_timeout"
    )


def _from_environment() -> tuple[str | None, int | None, int | None]:
    address, *numbers = (os.environ.get(name) or None for name in (ADDRESS, COUNT, INDEX))
    port = _port(address) if address else 0
    if all(number is None for number in numbers):
        # With only an address, JAX detects the rest if it knows the cluster.
        return address, None, None
    try:
        count, index = (int(number or "") for number in numbers)
    except ValueError:
        count, index = 0, 0
    if address is None or not 0 <= index < count:
        raise UserError(
            f"{ADDRESS}={address or ''}, {COUNT}={numbers[0] or ''} and {INDEX}={numbers[1] or ''} "
            f"are inconsistent: set them to host:port of process 0, the number of processes, and the "
            f"index of this process, from 0"
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
    """Raise UserError if this process, process 0, can't listen on the port; JAX would crash."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise UserError(
            f"process 0 can't listen on port {port} ({error.strerror}): choose another one in {ADDRESS}, "
            f"the same for all processes"
        ) from error


def is_first() -> bool:
    """Whether this is process 0, which writes everything but arrays."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def process_order(mesh: Mesh) -> list[int]:
    """Return the indices of the processes in the order of their devices in the mesh."""
    return list(dict.fromkeys(device.process_index for device in mesh.devices.flat))


def texts_of_all(text: str) -> list[str]:
    """Return the texts of all processes, in the order of their indices."""
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
    """Raise in every process the UserError or Interrupted that any of them raises in the block.

    Otherwise the other processes would wait forever for the one that left. All leave the block together.
    """
    message = ""
    try:
        yield
    except (UserError, Interrupted) as error:
        message = f"{type(error).__name__} {error}"
    for each in texts_of_all(message):
        kind, _, text = each.partition(" ")
        if kind:
            raise Interrupted(text) if kind == Interrupted.__name__ else UserError(text)


def first_alone(work: Callable[[], None]) -> None:
    """Run work() in process 0 while the others wait. Raises in every process, as `together` does."""
    with together():
        if is_first():
            work()


def on_all_processes(values: Any, sharding: Sharding) -> Any:
    """Return global arrays from a tree of NumPy arrays that every process holds whole."""
    if jax.process_count() == 1:
        return values
    return jax.tree.map(
        lambda each: jax.make_array_from_callback(each.shape, sharding, lambda part: each[part]),
        values,
    )


def to_host(array: jax.Array) -> np.ndarray:
    """Return a whole global array as a NumPy array, on every process."""
    return multihost_utils.process_allgather(array, tiled=True)
