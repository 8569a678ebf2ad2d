"""Files and folders that are written whole or not at all, and storage that fails."""

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

import jax
import numpy as np
from etils import epath

from guided_distill.errors import Interrupted, UserError
from guided_distill.training.processes import is_first

log = logging.getLogger(__name__)

Value = TypeVar("Value")

WAITS = (1.0, 4.0, 15.0)
"""Seconds between attempts."""

PASSING = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ENETUNREACH),
    *(errno.EHOSTUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, socket.EAI_AGAIN),
    errno.ENOTEMPTY,
}
"""The errors of shared disks and networks that are away for a while; the last, where a save that failed
is still writing into the folder that the next attempt clears."""


LOCK = ".lock"
LOST_AFTER = 600.0
"""Seconds without a sign of life after which a process of another machine counts as ended."""

_BEAT = 60.0


def _part(path: epath.Path) -> epath.Path:
    """A name beside `path` that no other writer has."""
    if not path.name:  # The current folder.
        path = path.absolute()
    return path.parent / f"{path.name}.{uuid.uuid4().hex[:12]}.part"


@contextlib.contextmanager
def whole(path: epath.Path) -> Iterator[epath.Path]:
    """Yields a place beside `path` for a new file or folder, and renames it to `path` after the block.

    If the block raises, nothing of it stays. A file replaces the file that is there; a folder must not
    be there yet, or be empty. Raises what the storage raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part(path)
    try:
        yield part
        if part.is_dir() and path.is_dir():
            path.rmdir()
        part.replace(path)
    except BaseException:
        with contextlib.suppress(Exception):  # The first error is the one to report.
            part.rmtree() if part.is_dir() else part.unlink()
        raise


def write_text(path: epath.Path, text: str) -> None:
    """Write a small file whole or not at all. Raises UserError if it can't be written."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.Path, data: bytes) -> None:
    """As `write_text`, of bytes. Of many processes, the first writes."""
    if not is_first():
        return

    def write() -> None:
        with whole(path) as part:
            part.write_bytes(data)

    persistently(write, path)


def npz_bytes(**arrays: np.ndarray) -> bytes:
    """An npz file of named arrays."""
    data = io.BytesIO()
    np.savez_compressed(data, allow_pickle=False, **arrays)
    return data.getvalue()


def read_npz(path: epath.Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file, by name. Raises UserError if it is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # Whatever damaged bytes raise in zipfile and NumPy.
        raise UserError(f"{path} can't be read ({first_line(error)}): remove it") from error


def check_writable(folder: epath.Path) -> None:
    """Raises what the storage raises unless a file can be written to the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = _part(folder / "probe")
    probe.write_text("")
    probe.unlink()


@contextlib.contextmanager
def held(folder: epath.Path) -> Iterator[None]:
    """Keeps other processes from training in the folder while the block runs.

    The file `LOCK` in it names the process. The lock is the kernel's, and ends with the process however
    that ends. Other machines may not see it, and buckets have none: there the file's age tells whether
    its process lives, which touches it every minute.

    Raises UserError if another process holds the folder, or the file can't be written.
    """
    file = folder / LOCK
    with storing(file):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, free = _locked(file)
        owner = _owner(file)
        foreign = owner is not None and owner.host != socket.gethostname()
        if free and owner is not None and (foreign or descriptor is None):
            free = _age(file) > LOST_AFTER or not (foreign or _runs(owner.process))
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
    """A descriptor with the kernel's lock, None where there are no locks; and whether no other has it."""
    if _is_remote(file):
        return None, True
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        return None, not isinstance(error, BlockingIOError)
    return descriptor, True


class _Owner(NamedTuple):
    host: str
    process: int


def _owner(file: epath.Path) -> _Owner | None:
    """Whom the file names, if anybody."""
    text = file.read_bytes().decode(errors="replace") if file.exists() else ""
    found = re.fullmatch(r"(\S+) ([0-9]{1,9})\n", text)
    return _Owner(found[1], int(found[2])) if found else None


def _age(file: epath.Path) -> float:
    """Seconds since it was written."""
    # Not epath's stat of a local file, which looks up the owner's name and fails where there is none.
    modified = file.stat().mtime if _is_remote(file) else os.stat(file).st_mtime
    return time.time() - modified


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # Another user's.
        pass
    return process != os.getpid()


def _held_by(folder: epath.Path, owner: _Owner | None, *, foreign: bool) -> UserError:
    who = f"process {owner.process} on {owner.host}" if owner else "another process"
    todo = (
        f"; if it no longer runs there, remove {folder / LOCK}, or start again in "
        f"{LOST_AFTER / 60:.0f} minutes"
    )
    return UserError(
        f"{who} is training in {folder}: wait for its end, or choose another --workdir"
        f"{todo if foreign else ''}"
    )


@contextlib.contextmanager
def _beating(file: epath.Path) -> Iterator[None]:
    """Renews the file's time every minute; empties the file in the end."""
    ended, text = threading.Event(), file.read_text()

    def beat() -> None:
        while not ended.wait(_BEAT):
            with contextlib.suppress(Exception):  # A disk that is away for a while.
                file.write_text(text) if _is_remote(file) else os.utime(file)

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
    """Do it, and again after each of `waits`, in seconds, while the error is one that can pass.

    verb: what is done with the path, "written" or "read". Raises UserError for any other error of the
    storage, such as a full disk, and for one that doesn't pass; of many processes, Interrupted for the
    latter, for whatever starts them can start them again.
    """
    with storing(path, verb=verb):
        for wait in waits:
            try:
                return work()
            except Exception as error:
                if not can_pass(error, path):
                    raise
                words = first_line(error)
                log.warning("%s can't be %s (%s): again in %g s", path, verb, words, wait)
                time.sleep(wait)
        return work()


@contextlib.contextmanager
def storing(path: epath.Path, *, verb: str = "written") -> Iterator[None]:
    """Raises as `persistently` does for an error in the block."""
    try:
        yield
    except Exception as error:
        passing = can_pass(error, path)
        # A wrong value in what was read need not be the storage's.
        if not _of_storage(error, path) or (
            verb == "read" and isinstance(error, ValueError) and not passing
        ):
            raise
        if jax.process_count() > 1 and passing:
            raise Interrupted(
                f"{path} can't be {verb} ({first_line(error)}); the same command resumes from the last "
                f"checkpoint"
            ) from error
        raise storage_error(path, error, verb=verb) from error


def _is_remote(path: epath.Path) -> bool:
    return "://" in str(path)


def _of_storage(error: Exception, path: epath.Path) -> bool:
    """Whether it is the storage that fails. Clients of buckets raise errors of every kind."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return False
    return isinstance(error, OSError | ValueError) or _is_remote(path)


def can_pass(error: Exception, path: epath.Path) -> bool:
    """Whether it speaks of a network or a shared disk that may come back."""
    if not _of_storage(error, path):
        return False
    if not isinstance(error, OSError | ValueError | ImportError):
        return True
    number = getattr(error, "errno", None)
    if found := re.search(r"\[OS error (\d+)", str(error)):  # TensorStore's.
        number = int(found[1])
    return (
        number in PASSING
        or isinstance(error, ConnectionError | TimeoutError)
        or any(code in str(error) for code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"))
    )


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).partition("\n")[0][:200] or type(error).__name__


def storage_error(path: epath.Path, error: Exception, *, verb: str = "written") -> UserError:
    """The sentence for a user whose disk is full or read-only."""
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
        todo = "gs:// needs the package's extra `tpu`"
    else:
        todo = "check its name, the network and your access to it"
    return UserError(f"{path} can't be reached ({first_line(error)}): {todo}")


def is_there(path: epath.Path) -> bool:
    """Whether the path exists. Raises UserError if its storage can't be asked."""
    try:
        return path.exists()
    except Exception as error:  # Clients of buckets raise errors of every kind.
        raise _unreachable(path, error) from error
