"""Checkpoints of one stage: saved asynchronously and atomically, self-describing, never half read.

Each is an Orbax composite of `params`, `ema` (where the stage keeps an average), `rest` (optimizer
and counters), `data` (the input pipeline's state), `about` (what the checkpoint is, see trained.py),
`layout` (names and shapes of the weights) and, of a pre-empted run, `unlogged` (sums of figures). The
weights of a teacher are never written again in its student's checkpoint.
"""

import contextlib
import hashlib
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from guided_distill.errors import UserError
from guided_distill.storage import WAITS, first_line, persistently, storing
from guided_distill.training.mesh import split_weights
from guided_distill.training.processes import first_alone
from guided_distill.training.state import TrainState

log = logging.getLogger(__name__)

Read = TypeVar("Read")

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


def latest_step(directory: epath.Path) -> int | None:
    """The step of the newest checkpoint in a stage's folder, or None, without opening it."""
    folder = directory / "checkpoints"
    steps = (
        [int(each.name) for each in folder.iterdir() if each.name.isdigit()]
        if folder.exists()
        else []
    )
    return max(steps, default=None)


def checkpoint_id(directory: epath.Path) -> str:
    """8 hex digits that differ for the newest checkpoints of two trainings, even of one config.

    They are of Orbax's note of when and what it saved, which a copy of the folder keeps.
    """
    step = latest_step(directory)
    note = directory / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
    return hashlib.sha256(note.read_bytes() if note.exists() else b"").hexdigest()[:8]


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
        with storing(directory):
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
        with storing(self.directory):
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
