"""Checkpoints of one stage: saved asynchronously and atomically, self-describing, never half read.

Each is an Orbax composite of `params`, `ema` (where the stage keeps an average), `rest` (optimizer
and counters), `data` (the input pipeline's state), `about` (what the checkpoint is, see trained.py),
`layout` (names and shapes of the weights) and, of a pre-empted run, `unlogged` (sums of figures). The
weights of a teacher are never written again in its student's checkpoint.
"""

import contextlib
import errno
import itertools
import logging
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from guided_distill.errors import Interrupted, UserError
from guided_distill.training.mesh import split_weights
from guided_distill.training.processes import first_alone, is_first
from guided_distill.training.state import TrainState

log = logging.getLogger(__name__)

Read = TypeVar("Read")

WAITS = (1.0, 4.0, 15.0)
"""Seconds between attempts to write."""

PASSING = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ENETUNREACH),
    *(errno.EHOSTUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, socket.EAI_AGAIN),
    errno.ENOTEMPTY,
}
"""What shared disks and networks answer when they are away for a while; the last, where a save that
failed is still writing into the folder that the next attempt clears."""

UNLOGGED = "unlogged"
ARRAYS = ("params", "ema", "rest")
TEXTS = ("data", "about", "layout", UNLOGGED)


def abstract(tree: Any, mesh: Mesh) -> Any:
    """The shapes of a tree of weights, and where they live on the mesh: to restore, or to compile for."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        split_weights(mesh, tree),
    )


def write_text(path: epath.Path, text: str) -> None:
    """Write a small file whole or not at all. Raises UserError if it can't be written."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.Path, data: bytes) -> None:
    """As `write_text`, of bytes. Of many processes, the first writes."""
    if not is_first():
        return
    part = path.parent / f"{path.name}.part"

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)

    persistently(write, path)


def persistently(
    write: Callable[[], Any], path: epath.Path, *, waits: Sequence[float] = WAITS
) -> None:
    """Write, and again after each of `waits`, in seconds, while the error is one that can pass.

    Raises UserError for any other error, such as a full disk, and for one that doesn't pass; of many
    processes, Interrupted for the latter, for whatever starts them can start them again.
    """
    with _told(path):
        for wait in waits:
            try:
                write()
                return
            except Exception as error:
                if not _can_pass(error, path):
                    raise
                words = first_line(error)
                log.warning("%s can't be written (%s): again in %g s", path, words, wait)
                time.sleep(wait)
        write()


@contextlib.contextmanager
def _told(path: epath.Path) -> Iterator[None]:
    """Raises as `persistently` does for an error in the block."""
    try:
        yield
    except Exception as error:
        if not _of_storage(error, path):
            raise
        if jax.process_count() > 1 and _can_pass(error, path):
            raise Interrupted(
                f"{path} can't be written ({first_line(error)}); the same command goes on from the last "
                f"checkpoint"
            ) from error
        raise storage_error(path, error) from error


def _is_remote(path: epath.Path) -> bool:
    return "://" in str(path)


def _of_storage(error: Exception, path: epath.Path) -> bool:
    """Whether it is the storage that fails. Clients of buckets raise errors of every kind."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return False
    return isinstance(error, OSError | ValueError) or _is_remote(path)


def _can_pass(error: Exception, path: epath.Path) -> bool:
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


def storage_error(path: epath.Path, error: Exception) -> UserError:
    """What to tell a user whose disk is full or not to be written."""
    if isinstance(error, ImportError):
        return _unreachable(path, error)
    return UserError(
        f"{path} can't be written ({first_line(error)}): make room or choose another "
        f"--workdir, then run the same command to go on from the last checkpoint"
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


def latest_step(directory: epath.Path) -> int | None:
    """The step of the newest checkpoint in a stage's folder, or None, without opening it."""
    folder = directory / "checkpoints"
    steps = (
        [int(each.name) for each in folder.iterdir() if each.name.isdigit()]
        if folder.exists()
        else []
    )
    return max(steps, default=None)


class Restored(NamedTuple):
    """A checkpoint as read: the state on its devices, the input pipeline's state, what it is."""

    state: TrainState
    data_state: Any
    about: dict[str, Any]
    unlogged: list[float]


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Left to the loop: JAX wants to be asked by one caller, with numbers that grow one by one."""
        return False


class StageCheckpoints:
    """The checkpoints in a stage's folder; a context manager that waits for its last save."""

    def __init__(self, directory: epath.Path, *, keep: int | None = None) -> None:
        """keep: how many checkpoints stay when a newer one is saved; None for all."""
        # Orbax refuses relative paths, and epath's absolute() spoils those like gs://bucket.
        self.directory = directory if directory.is_absolute() else directory.absolute()
        self._keep = keep
        with _told(directory):
            self._manager = self._open()

    def _open(self) -> _Manager:
        return _Manager(
            self.directory / "checkpoints",
            options=ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True),
            item_handlers={
                **{name: ocp.StandardCheckpointHandler() for name in ARRAYS},
                **{name: ocp.JsonCheckpointHandler() for name in TEXTS},
            },
        )

    def save(
        self,
        state: TrainState,
        *,
        data_state: Any,
        about: Mapping[str, Any],
        unlogged: Sequence[float] = (),
    ) -> None:
        """Start to save. Raises as `persistently` if this save, or the one before, can't be written."""
        items = {
            "params": ocp.args.StandardSave(state.params),
            "rest": ocp.args.StandardSave(_rest(state)),
            "data": ocp.args.JsonSave(data_state),
            "about": ocp.args.JsonSave(dict(about)),
            "layout": ocp.args.JsonSave(_layout(state.params)),
        }
        if state.ema:
            items["ema"] = ocp.args.StandardSave(state.ema)
        if unlogged:
            items[UNLOGGED] = ocp.args.JsonSave(list(unlogged))
        self._save(int(state.step), items)

    def save_result(self, step: int, params: Any, *, about: Mapping[str, Any]) -> None:
        """Start to save the weights alone: enough for `restore_result`, not to train on."""
        self._save(
            step,
            {
                "params": ocp.args.StandardSave(params),
                "about": ocp.args.JsonSave(dict(about)),
                "layout": ocp.args.JsonSave(_layout(params)),
            },
        )

    def _save(self, step: int, items: Mapping[str, Any]) -> None:
        self._latest = step, ocp.args.Composite(**items)
        self._persistently(lambda: self._manager.save(step, args=self._latest[1]))

    def _persistently(self, write: Callable[[], Any]) -> None:
        """Write; if that fails, then the latest state anew. Many processes leave that to a restart."""
        attempts = itertools.chain([write], itertools.repeat(self._rewrite))
        waits = WAITS if jax.process_count() == 1 else ()
        persistently(lambda: next(attempts)(), self.directory, waits=waits)

    def _rewrite(self) -> None:
        # By another manager, for this one remembers its failure.
        with contextlib.suppress(UserError):
            self.close()
        self._manager = self._open()
        step, items = self._latest
        self._manager.save(step, args=items)
        self._manager.wait_until_finished()

    def wait(self) -> None:
        """Return when everything is on disk; the state that was saved last must still be there.

        Raises as `persistently` if it can't be written.
        """
        self._persistently(self._manager.wait_until_finished)

    def restore(self, template: TrainState) -> Restored | None:
        """The newest whole checkpoint, or None if there is none.

        template: a TrainState of jax.ShapeDtypeStruct with shardings. A damaged checkpoint is moved
        into the folder `damaged`, with a warning, and the one before it is read instead.
        """
        return self._newest(lambda step: self._read(step, template))

    def restore_result(self, template: Any) -> tuple[int, Any] | None:
        """Step and weights that the newest whole checkpoint hands on, or None; as for `restore`."""
        return self._newest(lambda step: (step, self._read_result(step, template)))

    def about(self) -> dict[str, Any] | None:
        """What the newest checkpoint is, or None if there is none; as for `restore`."""
        return self._newest(
            lambda step: (
                self._manager.restore(
                    step, args=ocp.args.Composite(about=ocp.args.JsonRestore())
                ).about
            )
        )

    def _newest(self, read: Callable[[int], Read]) -> Read | None:
        while (step := self._manager.latest_step()) is not None:
            try:
                return read(step)
            except UserError:
                raise
            except Exception as error:  # Orbax raises a plain Exception for a truncated array.
                self._set_aside(step, error)
        return None

    def _check_layout(self, step: int, params: Any) -> None:
        """Another network is the user's to sort out: such a checkpoint isn't damaged."""
        item = ocp.args.Composite(layout=ocp.args.JsonRestore())
        if self._manager.restore(step, args=item).layout != _layout(params):
            raise UserError(
                f"{self.directory} holds the weights of another network than its config makes with this "
                f"version of guided_distill: use the version that trained it, or another --workdir"
            )

    def _read(self, step: int, template: TrainState) -> Restored:
        self._check_layout(step, template.params)
        items = {
            "params": ocp.args.StandardRestore(template.params),
            "rest": ocp.args.StandardRestore(_rest(template)),
            "data": ocp.args.JsonRestore(),
            "about": ocp.args.JsonRestore(),
        }
        if template.ema:
            items["ema"] = ocp.args.StandardRestore(template.ema)
        if UNLOGGED in self._manager.item_metadata(step):
            items[UNLOGGED] = ocp.args.JsonRestore()
        read = self._manager.restore(step, args=ocp.args.Composite(**items))
        state = TrainState(params=read.params, ema=read.get("ema") or {}, **read.rest)
        return Restored(state, read.data, read.about, read.get(UNLOGGED) or [])

    def _read_result(self, step: int, template: Any) -> Any:
        self._check_layout(step, template)
        averaged = "ema" in self._manager.item_metadata(step)
        name = "ema" if averaged else "params"
        read = self._manager.restore(
            step, args=ocp.args.Composite(**{name: ocp.args.StandardRestore(template)})
        )
        return read[name]

    def _set_aside(self, step: int, error: Exception) -> None:
        damaged = self.directory / "damaged"

        def move() -> None:
            damaged.mkdir(parents=True, exist_ok=True)
            target = damaged / f"{step}-{sum(1 for _ in damaged.iterdir())}"
            (self.directory / "checkpoints" / str(step)).rename(target)

        first_alone(move)
        self._manager.reload()
        previous = self._manager.latest_step()
        log.warning(
            "The checkpoint of step %d in %s is damaged (%s); it now lies in %s, and %s.",
            step,
            self.directory,
            first_line(error),
            damaged,
            "nothing older is left: the stage starts again"
            if previous is None
            else f"step {previous} is read instead",
        )

    def close(self) -> None:
        """Wait for the last save, and stop the manager's threads. Raises as `wait`."""
        with _told(self.directory):
            self._manager.close()

    def __enter__(self) -> "StageCheckpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _layout(params: Any) -> dict[str, list[int]]:
    """Name and shape of every weight."""
    return {
        jax.tree_util.keystr(path): list(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def _rest(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "optimizer": state.optimizer,
        "skipped": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
    }
