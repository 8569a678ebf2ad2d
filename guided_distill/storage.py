"""Atomic writes of files and folders, the lock of a run's folder, and retries when storage fails.

Only functions that need JAX import it, because the verb `runs` does without.
"""

import contextlib
import errno
import fcntl
import io
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from etils import epath

from guided_distill.errors import Interrupted, UserError

log = logging.getLogger(__name__)

Value = TypeVar("Value")

WAITS = (1.0, 4.0, 15.0)
"""Seconds to wait before each retry."""

TRANSIENT = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ENETUNREACH),
    *(errno.EHOSTUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, socket.EAI_AGAIN),
    errno.ENOTEMPTY,
}
"""Errors of shared disks and networks that may be temporary. The last one occurs when a failed save is
still writing to the folder that the next attempt clears."""


LOCK = ".lock"
LOST_AFTER = 600.0
"""Seconds without a heartbeat after which a process on another machine counts as dead."""

_BEAT = 60.0
"""Seconds between heartbeats."""


def _part(path: epath.Path) -> epath.Path:
    """Return a unique path beside `path`."""
    if not path.name:  # The current folder.
        path = path.absolute()
    return path.parent / f"{path.name}.{uuid.uuid4().hex[:12]}.part"


@contextlib.contextmanager
def whole(path: epath.Path) -> Iterator[epath.Path]:
    """Yield a temporary path beside `path` for a new file or folder, and rename it to `path` at the end.

    If the block raises, the temporary file or folder is removed. A new file replaces an existing one. For
    a new folder, `path` must not exist or must be an empty folder. Raises what the storage raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part(path)
    try:
        yield part
        if part.is_dir() and path.is_dir():
            path.rmdir()
        part.replace(path)
    except BaseException:
        with contextlib.suppress(Exception):  # Report the first error, not one of the clean-up.
            part.rmtree() if part.is_dir() else part.unlink()
        raise


def write_text(path: epath.Path, text: str) -> None:
    """Write a small text file atomically. Raises UserError if it can't be written."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.Path, data: bytes) -> None:
    """Like `write_text`, for bytes. Only process 0 writes."""
    from guided_distill.training.processes import is_first

    if not is_first():
        return

    def write() -> None:
        with whole(path) as part:
            part.write_bytes(data)

    persistently(write, path)


def npz_bytes(**arrays: np.ndarray) -> bytes:
    """Return the content of an npz file with these arrays."""
    data = io.BytesIO()
    np.savez_compressed(data, allow_pickle=False, **arrays)
    return data.getvalue()


def read_npz(path: epath.Path) -> dict[str, np.ndarray]:
    """Return the arrays of an npz file by name. Raises UserError if it is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # Damaged bytes can raise many errors in zipfile and NumPy.
        raise UserError(f"{path} can't be read ({first_line(error)}): remove it") from error


def check_writable(folder: epath.Path) -> None:
    """Create the folder and write a test file to it. Raises what the storage raises if either fails."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = _part(folder / "probe")
    probe.write_text("")
    probe.unlink()


@contextlib.contextmanager
def held(folder: epath.Path) -> Iterator[None]:
    """Lock the folder, so that no other process trains in it while the block runs.

    The file `LOCK` in the folder names the process. The kernel holds the lock and releases it when the
    process ends for any reason. Other machines may not see that lock, and buckets have none, so the
    process also touches the file every minute: if the file is old, its process is dead.

    Raises UserError if another process has locked the folder, or if the file can't be written.
    """
    file = folder / LOCK
    with storing(file):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, free = _locked(file)
        owner = _owner(file)
        foreign = owner is not None and owner.host != socket.gethostname()
        if free and owner is not None and (foreign or descriptor is None):
            free = age(file) > LOST_AFTER or not (foreign or _runs(owner.process))
    try:
        if not free:
            raise _held_by(folder, owner, foreign=foreign)
        with storing(file):
            file.write_text(f"{socket.gethostname()} {os.getpid()}\n")
        with _beating(file):
            yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _locked(file: epath.Path) -> tuple[int | None, bool]:
    """Return a locked descriptor, or None without locks, and whether no other process has the lock."""
    if is_remote(file):
        return None, True
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        return None, not isinstance(error, BlockingIOError)
    return descriptor, True


class _Owner(NamedTuple):
    """The process that a lock file names."""

    host: str
    process: int


def _owner(file: epath.Path) -> _Owner | None:
    """Return the process that the lock file names, if any."""
    text = file.read_bytes().decode(errors="replace") if file.exists() else ""
    found = re.fullmatch(r"(\S+) ([0-9]{1,9})\n", text)
    return _Owner(found[1], int(found[2])) if found else None


def is_held(folder: epath.Path) -> bool:
    """Whether another process trains in the folder, as its lock's file says; takes no lock."""
    file = folder / LOCK
    owner = _owner(file)
    if owner is None or age(file) > LOST_AFTER:
        return False
    return owner.host != socket.gethostname() or _runs(owner.process)


def age(file: epath.Path) -> float:
    """Return the seconds since the file was written."""
    # For a local file, epath's stat looks up the owner's name and fails if the owner has none.
    modified = file.stat().mtime if is_remote(file) else os.stat(file).st_mtime
    return time.time() - modified


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # The process is another user's.
        pass
    return process != os.getpid()


def _held_by(folder: epath.Path, owner: _Owner | None, *, foreign: bool) -> UserError:
    process = f"process {owner.process} on {owner.host}" if owner else "another process"
    remedy = (
        f"; if it no longer runs there, remove {folder / LOCK}, or start again in "
        f"{LOST_AFTER / 60:.0f} minutes"
    )
    return UserError(
        f"{process} is training in {folder}: wait until it ends, or choose another --workdir"
        f"{remedy if foreign else ''}"
    )


@contextlib.contextmanager
def _beating(file: epath.Path) -> Iterator[None]:
    """Touch the file every minute while the block runs, and empty it at the end."""
    ended, text = threading.Event(), file.read_text()

    def beat() -> None:
        while not ended.wait(_BEAT):
            with contextlib.suppress(Exception):  # The disk may be unavailable for a while.
                file.write_text(text) if is_remote(file) else os.utime(file)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Exception):
            file.write_text("")


def persistently(
    work: Callable[[], Value],
    path: epath.Path,
    *,
    waits: Sequence[float] = WAITS,
    verb: str = "written",
) -> Value:
    """Return work(), retrying it after each of `waits`, in seconds, while the error may be temporary.

    verb: "written" or "read", for messages about the path. Raises UserError for other storage errors,
    such as a full disk, and for a temporary error that outlasts all retries. If there are several
    processes, the latter raises Interrupted instead, so that their launcher restarts them.
    """
    with storing(path, verb=verb):
        for wait in waits:
            try:
                return work()
            except Exception as error:
                if not is_transient(error, path):
                    raise
                reason = first_line(error)
                log.warning("%s can't be %s (%s): retrying in %g s", path, verb, reason, wait)
                time.sleep(wait)
        return work()


@contextlib.contextmanager
def storing(path: epath.Path, *, verb: str = "written") -> Iterator[None]:
    """Convert storage errors in the block to UserError or Interrupted, as `persistently` does."""
    try:
        yield
    except Exception as error:
        import jax

        transient = is_transient(error, path)
        # A ValueError while reading may come from the data, not from the storage.
        if not _of_storage(error, path) or (
            verb == "read" and isinstance(error, ValueError) and not transient
        ):
            raise
        if jax.process_count() > 1 and transient:
            raise Interrupted(
                f"{path} can't be {verb} ({first_line(error)}); the same command resumes from the last "
                f"checkpoint"
            ) from error
        raise storage_error(path, error, verb=verb) from error


def is_remote(path: epath.Path) -> bool:
    """Whether the path is in a bucket."""
    return "://" in str(path)


def _of_storage(error: Exception, path: epath.Path) -> bool:
    """Whether the storage raised the error. Clients of buckets raise errors of every type."""
    from jax.errors import JaxRuntimeError

    if isinstance(error, JaxRuntimeError | UserError):
        return False
    return isinstance(error, OSError | ValueError) or is_remote(path)


def is_transient(error: Exception, path: epath.Path) -> bool:
    """Whether the error may be temporary: a network or shared disk that is unavailable for a while."""
    if not _of_storage(error, path):
        return False
    if not isinstance(error, OSError | ValueError | ImportError):
        return True
    number = getattr(error, "errno", None)
    if found := re.search(r"\[OS error (\d+)", str(error)):  # TensorStore's.
        number = int(found[1])
    return (
        number in TRANSIENT
        or isinstance(error, ConnectionError | TimeoutError)
        or any(code in str(error) for code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"))
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return str(error).partition("\n")[0][:200] or type(error).__name__


def storage_error(path: epath.Path, error: Exception, *, verb: str = "written") -> UserError:
    """Return the UserError for a path that can't be read or written, such as on a full disk."""
    if isinstance(error, ImportError):
        return _unreachable(path, error)
    if verb == "read":
        return UserError(
            f"{path} can't be read ({first_line(error)}): check its storage and your access to it, then "
            f"run the same command again"
        )
    return UserError(
        f"{path} can't be written ({first_line(error)}): make room or choose another place, then run the "
        f"same command again"
    )


def _unreachable(path: epath.Path, error: Exception) -> UserError:
    if isinstance(error, ImportError):
        remedy = "install the package's extra `tpu`, which gs:// needs"
    else:
        remedy = "check its name, the network and your access to it"
    return UserError(f"{path} can't be reached ({first_line(error)}): {remedy}")


def is_there(path: epath.Path) -> bool:
    """Whether the path exists. Raises UserError if its storage can't be reached."""
    try:
        return path.exists()
    except Exception as error:  # Clients of buckets raise errors of every type.
        raise _unreachable(path, error) from error
