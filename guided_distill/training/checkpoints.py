"""Checkpoints of one stage: saved asynchronously and atomically, self-describing, verified when read.

Each is an Orbax composite of `params`, `ema` (if the stage keeps an average), `rest` (optimizer and
counters), `data` (the input pipeline's state), `about` (the self-description, see trained.py), `layout`
(names and shapes of the weights) and, in a preempted run, `unlogged` (sums of metrics), with a file of
digests. A student's checkpoint never contains its teacher's weights.
"""

import contextlib
import functools
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
"""The items to read from a checkpoint; each entry lists an item's name and then its alternatives."""

ALL: Items = tuple((name,) for name in (*ARRAYS, *TEXTS))
RESULT: Items = (("layout",), ("ema", "params"))
ABOUT: Items = (("about",),)


def abstract(tree: Any, mesh: Mesh) -> Any:
    """Return the shapes and shardings of a tree of weights, to restore it or to compile for it."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        split_weights(mesh, tree),
    )


class Restored(NamedTuple):
    """A restored checkpoint: the state on its devices, the input pipeline's state, and the rest."""

    state: TrainState
    data_state: Any
    about: dict[str, Any]
    unlogged: list[float]


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Return False: only the training loop may ask JAX, which expects consecutive step numbers."""
        return False


class StageCheckpoints:
    """The checkpoints in a stage's folder; a context manager that waits for the last save."""

    def __init__(
        self, directory: epath.Path, *, keep: int | None = None, total_steps: int | None = None
    ) -> None:
        """keep: how many checkpoints to keep; None for all.

        total_steps: the stage's number of updates if this is its training job, which moves damaged
        checkpoints aside; None for other readers and writers, which move nothing.
        """
        # Orbax refuses relative paths, and epath's absolute() spoils those like gs://bucket.
        self.directory = directory if directory.is_absolute() else directory.absolute()
        self._keep = keep
        self._total_steps = total_steps
        try:
            with storing(directory):
                self._manager = self._open()
        except RecursionError as error:
            # Orbax passes over other damage to its metadata, from which it reads the times of the saves.
            raise UserError(
                f"{self._folder} has a checkpoint whose _CHECKPOINT_METADATA is damaged "
                f"({first_line(error)}): restore that file from a copy, or remove it"
            ) from error

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
        """Write the digests, when Orbax calls this in the background between writing and committing.

        A checkpoint and its digests are thus committed together, and a kill leaves both or neither.
        Process 0 reads back the files of all processes once they are complete, while training continues;
        if each process digested its own files, the processes would have to exchange the digests.
        """
        unfinished = [
            each
            for each in self._folder.iterdir()
            if each.name.partition(".")[0] == str(self._saving)
        ]
        for folder in unfinished:  # A single folder, whose suffix Orbax chooses.
            digests.write_digests(folder)

    def save(
        self,
        state: TrainState,
        *,
        data_state: Any,
        about: Mapping[str, Any],
        unlogged: Sequence[float] = (),
    ) -> None:
        """Start a save. Raises as `persistently` does if this save or the previous one can't be written.

        If a weight isn't finite, raises UserError and saves nothing.
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
        """Start a save of the weights alone: enough for `restore_result`, but not for `restore`.

        Raises as `save` does.
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
                f"start again in another --workdir, from finite weights and with a lower learning_rate"
            )

    def _save(self, step: int, items: Mapping[str, Any]) -> None:
        self._latest = step, ocp.args.Composite(**items)
        self._persistently(self._begin)

    def _begin(self) -> None:
        """Start a save of the latest state after the previous save has ended."""
        self._manager.wait_until_finished()
        step, items = self._latest
        self._saving = step
        self._manager.save(step, args=items)

    def _persistently(self, write: Callable[[], Any]) -> None:
        """Call `write`; if it fails, retry with a new manager. Several processes don't retry."""
        attempts = itertools.chain([write], itertools.repeat(self._rewrite))
        waits = WAITS if jax.process_count() == 1 else ()
        persistently(lambda: next(attempts)(), self.directory, waits=waits)

    def _rewrite(self) -> None:
        # A new manager is necessary because a manager raises its failure again.
        with contextlib.suppress(UserError):
            self.close()
        self._manager = self._open()
        self._begin()
        self._manager.wait_until_finished()

    def wait(self) -> None:
        """Wait until everything is on disk. The last saved state must still be in memory, for a retry.

        Raises as `persistently` does if it can't be written.
        """
        self._persistently(self._manager.wait_until_finished)

    def restore(self, template: TrainState) -> Restored | None:
        """Restore the newest undamaged checkpoint; return None if there is none.

        template: a TrainState of jax.ShapeDtypeStruct with shardings. A training job moves a checkpoint
        whose files don't match their digests into the folder `damaged`, with a warning, and reads the
        previous one. Raises UserError if a checkpoint can't be read or moved, and also for a damaged one
        if this isn't a training job, or if the stage was finished and no checkpoint is undamaged. Other
        errors, such as a lack of memory, are raised unchanged.
        """
        return self._newest(ALL, lambda step: self._read(step, template))

    def restore_result(self, template: Any) -> tuple[int, Any] | None:
        """Return the step and the result of the newest undamaged checkpoint or None, like `restore`."""
        return self._newest(RESULT, lambda step: (step, self._read_result(step, template)))

    def about(self) -> dict[str, Any] | None:
        """Return the self-description of the newest undamaged checkpoint or None, like `restore`."""
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
        # One of several processes can't retry alone, because Orbax synchronizes all of them.
        waits = WAITS if jax.process_count() == 1 else ()
        try:
            return persistently(lambda: read(step), folder, waits=waits, verb="read")
        except (UserError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            if is_there(folder / digests.FILE):
                raise
            # An earlier version wrote no digests. Orbax raises a plain Exception for a truncated array.
            raise UserError(
                f"{folder} can't be read ({first_line(error)}) and has no digests to show whether it is "
                f"damaged: restore it from a copy, or move it away to resume from the one before it"
            ) from error

    def _choose(self, items: Items) -> int | None:
        """Return the step of the newest undamaged checkpoint, or None. Process 0 decides for all."""
        chosen: int | None = None
        with together():
            if is_first():
                chosen = self._find_whole(items)
        (text, *_) = texts_of_all("" if chosen is None else str(chosen))
        chosen = int(text) if text else None
        if self._manager.latest_step() != chosen:
            self._manager.reload()
        return chosen

    def _find_whole(self, items: Items) -> int | None:
        """Find the step for `_choose`, and move newer, damaged checkpoints aside if that is allowed."""
        damaged: dict[int, str] = {}
        whole = None
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder = self._folder / str(step)
            damage = persistently(
                functools.partial(digests.find_damage, folder, items), folder, verb="read"
            )
            if not damage:
                whole = step
                break
            if self._total_steps is None:
                raise UserError(
                    f"{folder} is damaged ({damage}): restore it from a copy, or resume from the "
                    f"checkpoint before it with `guided-distill train`"
                )
            damaged[step] = damage
        if whole is None and self._total_steps in damaged:
            raise UserError(
                f"{self.directory} was finished, but all its checkpoints are damaged "
                f"({self._total_steps}: {damaged[self._total_steps]}): restore one from a copy, or "
                f"remove the folder to train the stage again from the start"
            )
        for step, damage in damaged.items():
            self._set_aside(step, damage, instead=whole)
        return whole

    def _check_layout(self, step: int, params: Any) -> None:
        """Raise UserError if the checkpoint holds another network; it is undamaged and stays in place."""
        item = ocp.args.Composite(layout=ocp.args.JsonRestore())
        if self._manager.restore(step, args=item).layout != _layout(params):
            raise UserError(
                f"{self.directory} holds the weights of another network than its config describes in "
                f"this version of guided_distill: use the version that trained it, or another --workdir"
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

    def _set_aside(self, step: int, damage: str, *, instead: int | None) -> None:
        damaged = self.directory / "damaged"

        def move() -> None:
            damaged.mkdir(parents=True, exist_ok=True)
            target = damaged / f"{step}-{sum(1 for _ in damaged.iterdir())}"
            (self._folder / str(step)).rename(target)

        persistently(move, damaged)
        log.warning(
            "The checkpoint of step %d in %s is damaged (%s); it was moved to %s, and %s.",
            step,
            self.directory,
            damage,
            damaged,
            "no older one is left: the stage starts again"
            if instead is None
            else f"step {instead} is read instead",
        )

    def close(self) -> None:
        """Wait for the last save, and stop the manager's threads. Raises as `wait` does."""
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
    """Return the shape of every weight by its name."""
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
