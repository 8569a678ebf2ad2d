"""Checkpoints: resuming, damage, failing storage, digests."""

import errno
import hashlib
import json
import logging
import os
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from etils import epath
from toy import fresh_state, source, train_toy

from guided_distill import storage
from guided_distill.data.pipeline import batches
from guided_distill.errors import UserError
from guided_distill.storage import write_text
from guided_distill.training import checkpoints as checkpoints_module
from guided_distill.training import digests
from guided_distill.training.checkpoints import ALL, StageCheckpoints, abstract
from guided_distill.training.mesh import data_mesh
from guided_distill.training.record import latest_step


@pytest.fixture
def directory(tmp_path):
    return epath.Path(tmp_path / "stage")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run: state, input pipeline's state, and its log."""
    folder = tmp_path_factory.mktemp("whole")
    state, place = train_toy(epath.Path(folder), data=source(with_nan=True))
    return state, place, (folder / "metrics.jsonl").read_text()


def template():
    return abstract(fresh_state(data_mesh()), data_mesh())


def restore(directory):
    with StageCheckpoints(directory, total_steps=12) as checkpoints:
        return checkpoints.restore(template())


class Interrupted:
    """The first `count` batches of an iterator, then KeyboardInterrupt."""

    def __init__(self, iterator, count):
        self._iterator, self._left = iterator, count
        self.get_state, self.set_state = iterator.get_state, iterator.set_state

    def __iter__(self):
        return self

    def __next__(self):
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt
        return next(self._iterator)


def interrupt(directory, count):
    iterator = batches(source(with_nan=True), batch_size=8, seed=3)
    with pytest.raises(KeyboardInterrupt):
        train_toy(directory, data=Interrupted(iterator, count))
    iterator.close()


@pytest.fixture
def two_saves(directory):
    """A stage that was interrupted after the saves at 4 and 8."""
    interrupt(directory, 11)
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["4", "8"]
    return directory


def test_a_stage_interrupted_anywhere_resumes_bit_for_bit(directory, whole, assert_same_weights):
    state, place, log = whole
    for count in (1, 5, 7, 1):
        interrupt(directory, count)
    resumed, resumed_place = train_toy(directory, data=source(with_nan=True))
    assert_same_weights(resumed, state)
    assert int(state.skipped) == 4
    assert resumed_place == place
    assert (directory / "metrics.jsonl").read_text() == log
    restored = restore(directory)
    assert_same_weights(restored.state, state)
    assert restored.data_state == place
    assert restored.about == {"stage": "toy"}


def truncate(folder):
    for path in Path(folder).rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)


def remove_weights(folder):
    for path in sorted(Path(folder, "rest").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [truncate, remove_weights])
def test_a_damaged_checkpoint_falls_back_with_a_warning(
    two_saves, whole, caplog, damage, assert_same_weights
):
    damage(two_saves / "checkpoints" / "8")
    with caplog.at_level(logging.WARNING):
        restored = restore(two_saves)
    assert int(restored.state.step) == 4
    assert "step 8" in caplog.text
    assert "step 4 is read instead" in caplog.text
    assert [path.name for path in (two_saves / "damaged").iterdir()] == ["8-0"]
    resumed, _ = train_toy(two_saves, data=source(with_nan=True))
    assert_same_weights(resumed, whole[0])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_if_all_checkpoints_are_damaged_the_stage_starts_again(
    two_saves, whole, caplog, assert_same_weights
):
    truncate(two_saves / "checkpoints")
    with caplog.at_level(logging.WARNING):
        resumed, _ = train_toy(two_saves, data=source(with_nan=True))
    assert "the stage starts again" in caplog.text
    assert len(list((two_saves / "damaged").iterdir())) == 2
    assert_same_weights(resumed, whole[0])


def test_another_network_is_refused_and_left_alone(two_saves):
    other = template().replace(params={"b": jax.ShapeDtypeStruct((2,), jnp.float32)})
    with StageCheckpoints(two_saves) as checkpoints:
        with pytest.raises(UserError, match="another network"):
            checkpoints.restore(other)
        with pytest.raises(UserError, match="another network"):
            checkpoints.restore_result(other.params)
    assert latest_step(two_saves) == 8
    assert not (two_saves / "damaged").exists()


@pytest.mark.parametrize("averaged", [True, False])
def test_the_result_is_the_average_if_there_is_one(directory, averaged, assert_same_weights):
    state = fresh_state(data_mesh())
    state = state.replace(ema={"a": state.params["a"] + 1.0} if averaged else {})
    with StageCheckpoints(directory) as checkpoints:
        checkpoints.save(state, data_state={}, about={})
        checkpoints.wait()
        step, weights = checkpoints.restore_result(template().params)
    assert step == 0
    assert_same_weights(weights, state.ema if averaged else state.params)


def test_a_folder_without_checkpoints_has_nothing_to_restore(directory):
    assert latest_step(directory) is None
    assert restore(directory) is None
    with StageCheckpoints(directory) as checkpoints:
        assert checkpoints.about() is None
        assert checkpoints.restore_result(template().params) is None


def test_a_folder_that_cannot_be_created_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    for action in (StageCheckpoints, lambda path: write_text(path / "text", "")):
        with pytest.raises(UserError, match="make room or choose another place"):
            action(epath.Path(tmp_path / "file" / "stage"))


def left_alone(directory, steps=("4", "8")):
    return (
        sorted(path.name for path in (directory / "checkpoints").iterdir()) == list(steps)
        and not (directory / "damaged").exists()
    )


def raising(monkeypatch, errors):
    """Make reads of checkpoints raise these errors, one per read."""
    read = ocp.CheckpointManager.restore

    def restore(self, *arguments, **options):
        if errors:
            raise errors.pop()
        return read(self, *arguments, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", restore)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
        KeyError("a bug"),
        ValueError("a bug"),
    ],
    ids=repr,
)
def test_errors_other_than_damage_are_raised_unchanged(two_saves, monkeypatch, error):
    raising(monkeypatch, [error])
    with pytest.raises(type(error)) as raised:
        restore(two_saves)
    assert raised.value is error
    assert left_alone(two_saves)


def test_reads_from_an_unavailable_disk_are_retried(two_saves, monkeypatch):
    waited = []
    monkeypatch.setattr(storage, "time", types.SimpleNamespace(sleep=waited.append))
    stale = OSError(errno.ESTALE, "Stale file handle")
    raising(monkeypatch, [stale] * 2)
    assert int(restore(two_saves).state.step) == 8
    assert waited == [1, 4]
    raising(monkeypatch, [stale] * 9)
    with pytest.raises(UserError, match=r"8 can't be read .*Stale file handle"):
        restore(two_saves)
    assert left_alone(two_saves)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def shorten(path):
    os.truncate(path, path.stat().st_size // 2)


def test_damage_to_any_file_is_detected_or_has_no_effect(two_saves, assert_same_weights):
    whole, folder = restore(two_saves), Path(two_saves, "checkpoints", "8")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} >= {
        "params",
        "ema",
        "rest",
        "data",
        "about",
        "layout",
    }
    unnoticed = set()
    for path in files:
        data = path.read_bytes()
        for damage in (flip, shorten):
            damage(path)
            if not digests.find_damage(epath.Path(folder), ALL):
                unnoticed.add(path.relative_to(folder).as_posix())
                found = restore(two_saves)
                assert_same_weights(found, whole)
            path.write_bytes(data)
    # Orbax's own metadata, which it writes after the digests.
    assert unnoticed == {"_CHECKPOINT_METADATA", "commit_success.txt"}


def test_metadata_that_are_nested_too_deeply_are_one_sentence(two_saves):
    Path(two_saves, "checkpoints", "8", "_CHECKPOINT_METADATA").write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"_CHECKPOINT_METADATA is damaged .*: restore that file"):
        restore(two_saves)
    Path(two_saves, "checkpoints", "8", "_CHECKPOINT_METADATA").unlink()
    assert restore(two_saves).state.step == 8


def test_digests_are_those_of_sha256sum(two_saves):
    folder = Path(two_saves, "checkpoints", "8")
    said = json.loads((folder / digests.FILE).read_text())["files"]
    for path, digest in said.items():
        assert hashlib.sha256((folder / path).read_bytes()).hexdigest() == digest


def test_digests_are_committed_with_their_checkpoint(directory, monkeypatch):
    """A kill at any instant leaves both or neither."""
    written, seen = digests.write_digests, []

    def write(folder):
        seen.append(latest_step(directory))
        written(folder)

    monkeypatch.setattr(digests, "write_digests", write)
    train_toy(directory, data=source(with_nan=False))
    assert seen == [None, 4, 8]


def test_a_finished_stage_never_starts_again_by_itself(directory):
    train_toy(directory, data=source(with_nan=False))
    shorten(Path(directory, "checkpoints", "8", "data", "metadata"))
    flip(Path(directory, "checkpoints", "12", "data", "metadata"))
    with pytest.raises(UserError, match=r"was finished, .*data/metadata.*remove the folder"):
        train_toy(directory, data=source(with_nan=False))
    assert left_alone(directory, ("12", "8"))


def test_readers_that_do_not_train_move_nothing(two_saves):
    flip(Path(two_saves, "checkpoints", "8", "about", "metadata"))
    flip(Path(two_saves, "checkpoints", "8", "ema", "_METADATA"))
    with StageCheckpoints(two_saves) as checkpoints:
        for read in (checkpoints.about, lambda: checkpoints.restore_result(template().params)):
            with pytest.raises(UserError, match=r"8 is damaged \((about|ema)/.*as it was written"):
                read()
    assert left_alone(two_saves)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_checkpoint_without_digests_is_read(two_saves):
    Path(two_saves, "checkpoints", "8", digests.FILE).unlink()
    assert int(restore(two_saves).state.step) == 8
    truncate(two_saves / "checkpoints" / "8" / "rest")
    with pytest.raises(UserError, match=r"8 can't be read .* no digests"):
        restore(two_saves)
    assert left_alone(two_saves)


def test_process_0_chooses_the_checkpoint_for_all(two_saves, monkeypatch):
    monkeypatch.setattr(checkpoints_module, "is_first", lambda: False)
    monkeypatch.setattr(checkpoints_module, "texts_of_all", lambda text: ["4", text])
    monkeypatch.setattr(digests, "find_damage", lambda *_: pytest.fail("looked itself"))
    assert int(restore(two_saves).state.step) == 4


@pytest.mark.parametrize("which", ["params", "ema"])
def test_weights_that_are_not_finite_are_not_saved(directory, which):
    state = fresh_state(data_mesh()).replace(**{which: {"a": jnp.array([1.0, jnp.nan])}})
    with StageCheckpoints(directory) as checkpoints:
        with pytest.raises(UserError, match=r"not finite at step 0.*learning_rate"):
            checkpoints.save(state, data_state={}, about={})
        with pytest.raises(UserError, match="not finite"):
            checkpoints.save_result(0, {"a": jnp.array([jnp.inf])}, about={})
    assert latest_step(directory) is None
