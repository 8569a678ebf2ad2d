"""Checkpoints of one stage: saved asynchronously and atomically, self-describing, never half read.

Each is an Orbax composite of `params`, `ema` (where the stage keeps an average), `rest` (optimizer
and counters), `data` (the input pipeline's state), `about` (what the checkpoint is, see trained.py),
`layout` (names and shapes of the weights) and, of a pre-empted run, `unlogged` (sums of figures), and
of the digests of their files. The weights of a teacher are never written again in its student's
checkpoint.
"""

import contextlib
import functools
import hashlib
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from guided_distill.errors import UserError
from guided_distill.storage import WAITS, first_line, is_there, persistently, storing
from guided_distill.training import digests
from guided_distill.training.mesh import split_weights
from guided_distill.training.processes import is_first, texts_of_all, together
from guided_distill.training.state import TrainState

log = logging.getLogger(__name__)

Read = TypeVar("Read")

UNLOGGED = "unlogged"
ARRAYS = ("params", "ema", "rest")
TEXTS = ("data", "about", "layout", UNLOGGED)

Items = tuple[tuple[str, ...], ...]
"""What is read of a checkpoint: each the name of an item, or of those that can take its place."""

ALL: Items = tuple((name,) for name in (*ARRAYS, *TEXTS))
RESULT: Items = (("layout",), ("ema", "params"))
ABOUT: Items = (("about",),)


def abstract(tree: Any, mesh: Mesh) -> Any:
    """The shapes of a tree of weights, and where they live on the mesh: to restore, or to compile for."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        split_weights(mesh, tree),
    )


def latest_step(directory: epath.Path) -> int | None:
    """The step of the newest checkpoint in a stage's folder, or None, without opening it.

    Raises UserError if the folder can't be reached.
    """
    folder = directory / "checkpoints"
    steps = (
        [int(each.name) for each in folder.iterdir() if each.name.isdigit()]
        if is_there(folder)
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

    def __init__(
        self, directory: epath.Path, *, keep: int | None = None, total_steps: int | None = None
    ) -> None:
        """keep: how many checkpoints stay when a newer one is saved; None for all.

        total_steps: updates of the stage, where this is its training, which sets damaged checkpoints
        aside; None for whoever reads or writes a result, and moves nothing.
        """
        # Orbax refuses relative paths, and epath's absolute() spoils those like gs://bucket.
        self.directory = directory if directory.is_absolute() else directory.absolute()
        self._keep = keep
        self._total_steps = total_steps
        with storing(directory):
            self._manager = self._open()

    def _open(self) -> _Manager:
        return _Manager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                create=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digests),
            ),
            item_handlers={
                **{name: ocp.StandardCheckpointHandler() for name in ARRAYS},
                **{name: ocp.JsonCheckpointHandler() for name in TEXTS},
            },
        )

    @property
    def _folder(self) -> epath.Path:
        return self.directory / "checkpoints"

    def _write_digests(self) -> None:
        """Orbax calls this in the background, when the items are whole and not yet committed.

        Thus a checkpoint and its digests are committed as one, and a kill leaves both or none. Of many
        processes, the first does it for all, once all have written: that reads the checkpoint back once,
        while training goes on, but needs no exchange, as digests by each process of its own files would.
        """
        unfinished = [
            each
            for each in self._folder.iterdir()
            if each.name.partition(".")[0] == str(self._saving)
        ]
        for folder in unfinished:  # One, whose name is Orbax's to choose.
            digests.write_digests(folder)

    def save(
        self,
        state: TrainState,
        *,
        data_state: Any,
        about: Mapping[str, Any],
        unlogged: Sequence[float] = (),
    ) -> None:
        """Start to save. Raises as `persistently` if this save, or the one before, can't be written.

        Raises UserError, and saves nothing, unless all weights are finite.
        """
        self._check_finite(int(state.step), (state.params, state.ema))
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
        """Start to save the weights alone: enough for `restore_result`, not to train on.

        Raises as `save`.
        """
        self._check_finite(step, params)
        self._save(
            step,
            {
                "params": ocp.args.StandardSave(params),
                "about": ocp.args.JsonSave(dict(about)),
                "layout": ocp.args.JsonSave(_layout(params)),
            },
        )

    def _check_finite(self, step: int, weights: Any) -> None:
        if not _all_finite(weights):
            raise UserError(
                f"{self.directory} has weights that are not finite at step {step}, which are not saved: "
                f"start again from finite ones in another --workdir, with a lower learning_rate"
            )

    def _save(self, step: int, items: Mapping[str, Any]) -> None:
        self._latest = step, ocp.args.Composite(**items)
        self._persistently(self._begin)

    def _begin(self) -> None:
        """Start to save the latest state, when the save before has ended."""
        self._manager.wait_until_finished()
        step, items = self._latest
        self._saving = step
        self._manager.save(step, args=items)

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
        self._begin()
        self._manager.wait_until_finished()

    def wait(self) -> None:
        """Return when everything is on disk; the state that was saved last must still be there.

        Raises as `persistently` if it can't be written.
        """
        self._persistently(self._manager.wait_until_finished)

    def restore(self, template: TrainState) -> Restored | None:
        """The newest whole checkpoint, or None if there is none.

        template: a TrainState of jax.ShapeDtypeStruct with shardings. In a training, a checkpoint whose
        files aren't as they were written is moved into the folder `damaged`, with a warning, and the
        one before it is read instead. Raises UserError if it may not be moved, for a damaged checkpoint
        elsewhere or as the only one of a stage that was finished, and for what can't be read; what else
        goes wrong, such as want of memory, is raised as it is.
        """
        return self._newest(ALL, lambda step: self._read(step, template))

    def restore_result(self, template: Any) -> tuple[int, Any] | None:
        """Step and weights that the newest whole checkpoint hands on, or None; as for `restore`."""
        return self._newest(RESULT, lambda step: (step, self._read_result(step, template)))

    def about(self) -> dict[str, Any] | None:
        """What the newest checkpoint is, or None if there is none; as for `restore`."""
        return self._newest(
            ABOUT,
            lambda step: (
                self._manager.restore(
                    step, args=ocp.args.Composite(about=ocp.args.JsonRestore())
                ).about
            ),
        )

    def _newest(self, items: Items, read: Callable[[int], Read]) -> Read | None:
        step = self._choose(items)
        if step is None:
            return None
        folder = self._folder / str(step)
        # Of many processes, one that tried again would be alone where Orbax lets all meet.
        waits = WAITS if jax.process_count() == 1 else ()
        try:
            return persistently(lambda: read(step), folder, waits=waits, verb="read")
        except (UserError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            if is_there(folder / digests.FILE):
                raise
            # Of an earlier version. Orbax raises a plain Exception for a truncated array.
            raise UserError(
                f"{folder} can't be read ({first_line(error)}) and has no digests to tell whether it is "
                f"damaged: bring it back, or move it away to go on from the checkpoint before it"
            ) from error

    def _choose(self, items: Items) -> int | None:
        """The step of the newest whole checkpoint, or None: process 0 looks, and all follow."""
        chosen: int | None = None
        with together():
            if is_first():
                chosen = self._find_whole(items)
        (said, *_) = texts_of_all("" if chosen is None else str(chosen))
        chosen = int(said) if said else None
        if self._manager.latest_step() != chosen:
            self._manager.reload()
        return chosen

    def _find_whole(self, items: Items) -> int | None:
        """As `_choose`, after setting aside what is newer and damaged, where that is allowed."""
        damaged: dict[int, str] = {}
        whole = None
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder = self._folder / str(step)
            words = persistently(
                functools.partial(digests.find_damage, folder, items), folder, verb="read"
            )
            if not words:
                whole = step
                break
            if self._total_steps is None:
                raise UserError(
                    f"{folder} is damaged ({words}): bring it back, or let `guided-distill train` go on "
                    f"from the checkpoint before it"
                )
            damaged[step] = words
        if whole is None and self._total_steps in damaged:
            raise UserError(
                f"{self.directory} was finished, and no checkpoint of it is whole ({self._total_steps}: "
                f"{damaged[self._total_steps]}): bring one back, or remove the folder to train the stage "
                f"again from its start"
            )
        for step, words in damaged.items():
            self._set_aside(step, words, instead=whole)
        return whole

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
        if (self._folder / str(step) / UNLOGGED).exists():
            items[UNLOGGED] = ocp.args.JsonRestore()
        read = self._manager.restore(step, args=ocp.args.Composite(**items))
        state = TrainState(params=read.params, ema=read.get("ema") or {}, **read.rest)
        return Restored(state, read.data, read.about, read.get(UNLOGGED) or [])

    def _read_result(self, step: int, template: Any) -> Any:
        self._check_layout(step, template)
        name = "ema" if (self._folder / str(step) / "ema").exists() else "params"
        read = self._manager.restore(
            step, args=ocp.args.Composite(**{name: ocp.args.StandardRestore(template)})
        )
        return read[name]

    def _set_aside(self, step: int, words: str, *, instead: int | None) -> None:
        damaged = self.directory / "damaged"

        def move() -> None:
            damaged.mkdir(parents=True, exist_ok=True)
            target = damaged / f"{step}-{sum(1 for _ in damaged.iterdir())}"
            (self._folder / str(step)).rename(target)

        persistently(move, damaged)
        log.warning(
            "The checkpoint of step %d in %s is damaged (%s); it now lies in %s, and %s.",
            step,
            self.directory,
            words,
            damaged,
            "nothing older is left: the stage starts again"
            if instead is None
            else f"step {instead} is read instead",
        )

    def close(self) -> None:
        """Wait for the last save, and stop the manager's threads. Raises as `wait`."""
        with storing(self.directory):
            self._manager.close()

    def __enter__(self) -> "StageCheckpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@jax.jit
def _all_finite(weights: Any) -> jax.Array:
    return jnp.all(jnp.array([jnp.isfinite(each).all() for each in jax.tree.leaves(weights)]))


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
