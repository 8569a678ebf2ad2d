"""The train step, and checkpoints that survive what happens to them."""

import json
import logging
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import AxisType

from guided_distill.config import Optimization
from guided_distill.errors import UserError
from guided_distill.objectives.weighting import Loss
from guided_distill.training.checkpoints import StageCheckpoints, abstract
from guided_distill.training.mesh import data_mesh, replicated
from guided_distill.training.metrics import MetricsLog, read_metrics
from guided_distill.training.state import initial_state, make_optimizer
from guided_distill.training.step import make_train_step

SETTINGS = Optimization(steps=20, learning_rate=0.1, ema_decay=0.9)


def loss(params, frozen, batch, key):
    noise = jax.random.normal(key, batch["image"].shape)
    error = batch["image"] @ params["a"] + frozen["shift"] + 0.01 * noise.sum(axis=1)
    return Loss(jnp.square(error), {})


def setup(devices=1):
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    optimizer = make_optimizer(SETTINGS, steps=20)
    state = initial_state({"a": jnp.arange(3.0)}, optimizer, ema_decay=0.9)
    step = make_train_step(loss, optimizer, ema_decay=0.9, mesh=mesh)
    return step, jax.device_put(state, replicated(mesh))


def data(count, size=8):
    return {"image": np.random.default_rng(0).normal(size=(count, size, 3)).astype(np.float32)}


FROZEN = {"shift": np.float32(1.0)}


def run(splits, batches, devices=1):
    step, state = setup(devices)
    start = 0
    for count in splits:
        chunk = {name: value[start : start + count] for name, value in batches.items()}
        state, report = step(state, FROZEN, chunk, jax.random.key(7))
        start += count
    return state, report


def assert_equal(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_one_call_of_many_updates_is_many_calls():
    batches = data(6)
    assert_equal(run([6], batches)[0], run([2, 2, 2], batches)[0], rtol=1e-6)


def test_four_devices_make_the_update_of_one():
    assert len(jax.devices()) == 4
    batches = data(4)
    assert_equal(run([4], batches)[0], run([4], batches, devices=4)[0], rtol=2e-5)


def test_a_loss_that_is_not_finite_is_skipped_and_counted():
    batches = data(3)
    batches["image"][1] = np.nan
    state, report = run([3], batches)
    assert (int(state.step), int(report.skipped), int(report.skipped_in_a_row)) == (3, 1, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert np.isfinite(report.metrics.compute()["loss"])


def test_average_follows_its_recurrence_and_is_no_alias():
    state, _ = run([1], data(1))
    old, new = np.arange(3.0), np.asarray(state.params["a"])
    np.testing.assert_allclose(state.ema["a"], 0.1 * old + 0.9 * new, rtol=1e-5)
    assert not np.allclose(state.ema["a"], state.params["a"])


def save_two(directory):
    batches = data(4)
    step, state = setup()
    with StageCheckpoints(directory, keep=2) as checkpoints:
        for start in (0, 2):
            chunk = {"image": batches["image"][start : start + 2]}
            state, _ = step(state, FROZEN, chunk, jax.random.key(7))
            checkpoints.save(state, data_state={"next": start}, about={"stage": "teacher"})
    return state


def restore(directory):
    _, state = setup()
    with StageCheckpoints(directory, keep=2) as checkpoints:
        return checkpoints.restore(abstract(state, replicated(data_mesh())))


def test_checkpoints_return_bit_for_bit_and_can_be_donated(tmp_path):
    state = save_two(epath.Path(tmp_path))
    restored = restore(epath.Path(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, restored.state, state)
    assert restored.data_state == {"next": 2}
    assert restored.about == {"stage": "teacher"}
    optimizer = make_optimizer(SETTINGS, steps=20)
    step = make_train_step(loss, optimizer, ema_decay=0.9, mesh=data_mesh())
    after, _ = step(restored.state, FROZEN, data(1), jax.random.key(7))
    assert int(after.step) == 5


def largest_file(folder):
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )


def truncate_all(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)


def remove_an_item(folder):
    for path in sorted((folder / "rest").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [truncate_all, remove_an_item])
def test_damaged_checkpoint_falls_back_loudly(tmp_path, caplog, damage):
    save_two(epath.Path(tmp_path))
    damage(tmp_path / "checkpoints" / "4")
    with caplog.at_level(logging.WARNING):
        restored = restore(epath.Path(tmp_path))
    assert int(restored.state.step) == 2
    assert "step 4" in caplog.text
    assert "is damaged" in caplog.text
    assert (tmp_path / "damaged" / "4-0").exists()


def test_another_networks_checkpoint_is_refused_and_left_alone(tmp_path):
    save_two(epath.Path(tmp_path))
    _, state = setup()
    other = state.replace(params={"b": jnp.zeros(5)}, ema={"b": jnp.zeros(5)})
    with (
        StageCheckpoints(epath.Path(tmp_path)) as checkpoints,
        pytest.raises(UserError, match="another network"),
    ):
        checkpoints.restore(abstract(other, replicated(data_mesh())))
    assert (tmp_path / "checkpoints" / "4").exists()


def test_metrics_forget_what_lies_beyond_the_restored_step(tmp_path):
    directory = epath.Path(tmp_path)
    log = MetricsLog(directory, step=0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step})
    log.close()
    log = MetricsLog(directory, step=2)
    log.write(3, {"loss": float("nan")})
    log.close()
    assert [row["step"] for row in read_metrics(directory)] == [1, 2, 3]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["loss"] is None
