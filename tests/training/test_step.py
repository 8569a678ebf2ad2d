"""The train step and the loop around it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from toy import (
    FROZEN,
    KEY,
    OPTIMIZER,
    SETTINGS,
    fresh_state,
    loss,
    random_batches,
    source,
    step_on,
    train_toy,
)

from guided_distill.errors import UserError
from guided_distill.training.mesh import split_batch
from guided_distill.training.record import latest_step, read_metrics
from guided_distill.training.state import initial_state
from guided_distill.training.step import make_train_step


def run(mesh, batches, splits):
    state, start = fresh_state(mesh), 0
    for count in splits:
        chunk = {name: value[start : start + count] for name, value in batches.items()}
        state, report = step_on(mesh)(state, FROZEN, chunk, jax.random.key(KEY))
        start += count
    return state, report


def assert_close(one, other, rtol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), one, other)


def test_one_call_makes_the_updates_of_plain_optax(mesh_of):
    """Example b of update n uses key split(fold_in(key, n))[b].

    The average follows avg <- d avg + (1 - d) new.
    """
    batches = random_batches(6)
    params = average = {"a": jnp.arange(2.0)}
    optimizer = OPTIMIZER.init(params)
    for n in range(6):
        batch = {name: value[n] for name, value in batches.items()}
        keys = jax.random.split(jax.random.fold_in(jax.random.key(KEY), n), 8)
        gradient = jax.grad(lambda p, b=batch, k=keys: loss(p, FROZEN, b, k).per_example.mean())
        change, optimizer = OPTIMIZER.update(gradient(params), optimizer, params)
        params = optax.apply_updates(params, change)
        decay = min(0.9, (1 + n) / (10 + n))
        average = optax.incremental_update(params, average, 1 - decay)
    for splits in ([6], [2, 2, 2], [1] * 6):
        state, report = run(mesh_of(1), batches, splits)
        assert int(state.step) == 6
        # Separately compiled programs round differently, by an ulp or two per update.
        assert_close((state.params, state.ema), (params, average), rtol=2e-6)
    assert state.result is state.ema
    assert int(report.skipped) == 0


def test_four_devices_make_the_update_of_one(mesh_of):
    batches = random_batches(4)
    one, reported = run(mesh_of(1), batches, [4])
    four, reported_by_four = run(mesh_of(4), batches, [4])
    # The mean over the batch is summed in another order: a few ulp of 1.2e-7 per update.
    assert_close(one, four, rtol=4e-6)
    assert_close(reported.metrics.compute(), reported_by_four.metrics.compute(), rtol=4e-6)


@pytest.mark.parametrize("fsdp", [1, 2])
def test_gradients_of_rounded_weights_are_averaged_in_float32(mesh_of, fsdp):
    mesh = mesh_of(4, fsdp=fsdp)
    step = make_train_step(
        loss,
        OPTIMIZER,
        ema_decay=SETTINGS.ema_decay,
        mesh=mesh,
        rounded=lambda params: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params),
    )
    program = step.lower(fresh_state(mesh), FROZEN, random_batches(1), jax.random.key(KEY))
    sums = re.findall(
        r'stablehlo\.(?:all_reduce|reduce_scatter)".*?\}\) : \((.*?)\)',
        program.as_text(),
        re.DOTALL,
    )
    # The sums of the gradient [2], whole or in parts, and of the loss.
    assert any("tensor<2xf32>" in each for each in sums)
    assert "bf16" in program.as_text()
    assert not [each for each in sums if "bf16" in each]


def test_batches_are_split_and_weights_are_replicated(mesh_of):
    mesh = mesh_of(4)
    images = jax.device_put(random_batches(2)["image"], split_batch(mesh, axis=1))
    assert {shard.data.shape for shard in images.addressable_shards} == {(2, 2, 2)}
    state, _ = run(mesh, random_batches(2), [2])
    assert {shard.data.shape for shard in state.params["a"].addressable_shards} == {(2,)}


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_skipped_and_counted(mesh_of, assert_same_weights, bad):
    mesh, batches = mesh_of(1), random_batches(3)
    before, _ = run(mesh, batches, [1])
    if bad == "loss":
        batches["image"][1] = np.nan
    else:  # The loss stays finite, but the square of its gradient overflows.
        weights = np.asarray(before.params["a"])
        batches["image"][1] = 3e19 * weights[::-1] * [1, -1]
    after, report = run(mesh, batches, [1, 1])
    kept = [(state.params, state.ema, state.optimizer) for state in (before, after)]
    assert_same_weights(*kept)
    assert (int(after.step), int(report.skipped), int(report.skipped_in_a_row)) == (2, 1, 1)
    after, report = run(mesh, batches, [1, 1, 1])
    assert (int(report.skipped), int(report.skipped_in_a_row)) == (1, 0)
    assert not np.array_equal(after.params["a"], before.params["a"])


def test_skipped_losses_do_not_spoil_the_logged_mean(mesh_of):
    batches = random_batches(2)
    batches["image"][1] = np.nan
    first = {name: value[:1] for name, value in batches.items()}
    _, both = run(mesh_of(1), batches, [2])
    _, alone = run(mesh_of(1), first, [1])
    assert_close(both.metrics.compute(), alone.metrics.compute(), rtol=2e-6)


def test_a_state_shares_no_memory_and_may_be_donated(mesh_of):
    params = {"a": jnp.arange(2.0)}
    state = initial_state(params, OPTIMIZER, ema_decay=0.9)
    after, _ = step_on(mesh_of(1))(state, FROZEN, random_batches(1), jax.random.key(KEY))
    np.testing.assert_array_equal(params["a"], [0.0, 1.0])
    addresses = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after)]
    assert len(set(addresses)) == len(addresses)
    assert not np.array_equal(after.ema["a"], after.params["a"])


class BadBatches:
    """Batches that aren't finite at the updates in `bad`."""

    def __init__(self, bad):
        self.bad, self.place = bad, 0

    def __iter__(self):
        return self

    def __next__(self):
        batch = {name: value[0] for name, value in random_batches(1).items()}
        self.place += 1
        return {**batch, "image": batch["image"] * (np.nan if self.place in self.bad else 1.0)}

    def get_state(self):
        return self.place


def test_too_many_skipped_in_a_row_end_the_stage(tmp_path):
    state, _ = train_toy(epath.Path(tmp_path / "some"), data=BadBatches({2, 3, 5, 6, 9}))
    assert int(state.skipped) == 5
    directory = epath.Path(tmp_path / "many")
    with pytest.raises(
        UserError,
        match=r"toy: .* for 3 updates in a row before step 8: .* --workdir .* lower .*rate",
    ):
        train_toy(directory, data=BadBatches({6, 7, 8, 9}))
    assert latest_step(directory) == 4


def test_a_log_line_is_the_mean_since_the_one_before(tmp_path):
    rows = {}
    for log_every in (2, 4):
        directory = epath.Path(tmp_path / str(log_every))
        state, _ = train_toy(
            directory, data=source(with_nan=False), log_every=log_every, total_steps=9
        )
        assert int(state.step) == latest_step(directory) == 9
        rows[log_every] = {row["step"]: row for row in read_metrics(directory)}
    assert list(rows[2]) == [2, 4, 6, 8, 9]
    assert list(rows[4]) == [4, 8, 9]
    for figure in ("loss", "gradient_norm"):
        for step in (4, 8):
            mean = (rows[2][step - 2][figure] + rows[2][step][figure]) / 2
            assert rows[4][step][figure] == pytest.approx(mean, rel=1e-6)
        assert rows[4][9][figure] == rows[2][9][figure]
