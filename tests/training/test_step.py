import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from guided_distill import pipeline
from guided_distill.config import Halving, Model, Optimization
from guided_distill.objectives.halving import halving_loss
from guided_distill.objectives.weighting import Loss
from guided_distill.training.checkpoints import StageCheckpoints, abstract
from guided_distill.training.mesh import replicated
from guided_distill.training.state import initial_state, make_optimizer
from guided_distill.training.step import make_train_step
from guided_distill.training.trained import network_of

FEATURES = 3
BATCH = 8
EMA_DECAY = 0.9
SETTINGS = Optimization(learning_rate=0.05, gradient_clip=0.5)
KEY = jax.random.key(7)


def noisy_regression(params, frozen, batch, key):
    """Squared error to a linear teacher at noisy inputs; a negative label has an endless slope."""
    x = batch["image"] + 0.1 * jax.random.normal(key, batch["image"].shape)
    error = x @ (params["w"] - frozen["w"]) + params["b"]
    steep = jnp.sqrt(jnp.where(batch["label"] < 0, 0.0 * params["b"], 1.0))
    return Loss(error**2 + steep, {"error": jnp.abs(error)})


def fresh_state(optimizer, *, ema_decay=EMA_DECAY):
    params = {"w": jnp.zeros(FEATURES), "b": jnp.zeros(())}
    return initial_state(params, optimizer, ema_decay=ema_decay)


def make_batches(count, *, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(count, BATCH, FEATURES)).astype(np.float32),
        "label": np.zeros((count, BATCH), np.int32),
    }


def pick(batches, start, stop):
    return {name: array[start:stop] for name, array in batches.items()}


def figures(metrics):
    return {name: float(value) for name, value in metrics.compute().items()}


FROZEN = {"w": np.arange(1.0, 1.0 + FEATURES, dtype=np.float32)}
OPTIMIZER = make_optimizer(SETTINGS, steps=100)


@pytest.fixture(scope="module")
def step(mesh_of):
    return make_train_step(noisy_regression, OPTIMIZER, ema_decay=EMA_DECAY, mesh=mesh_of(4))


def test_many_updates_in_one_call_are_single_calls(step):
    batches = make_batches(6)
    together, report = step(fresh_state(OPTIMIZER), FROZEN, batches, KEY)
    state, sums = fresh_state(OPTIMIZER), None
    for n in range(6):
        state, one = step(state, FROZEN, pick(batches, n, n + 1), KEY)
        sums = one.metrics if sums is None else sums.merge(one.metrics)
    assert int(together.step) == 6
    for many, single in zip(jax.tree.leaves(together), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(many, single, rtol=1e-6, atol=1e-7)
    assert figures(report.metrics) == pytest.approx(figures(sums), rel=1e-6)


def test_each_update_draws_noise_of_its_own(step):
    batch = make_batches(1)
    losses = []
    for n in range(2):
        state = fresh_state(OPTIMIZER).replace(step=jnp.asarray(n, jnp.int32))
        losses.append(float(step(state, FROZEN, batch, KEY)[1].metrics.compute()["loss"]))
    assert losses[0] != losses[1]


@pytest.mark.parametrize("cause", ["loss", "gradient"])
def test_a_nonfinite_update_changes_only_step_and_counts(step, cause, assert_same_weights):
    batches = make_batches(4)
    if cause == "loss":
        batches["image"][2, 1, 0] = np.nan
    else:
        batches["label"][2, 1] = -1
    before, _ = step(fresh_state(OPTIMIZER), FROZEN, pick(batches, 0, 2), KEY)
    expected = jax.device_get(before)
    after, report = step(before, FROZEN, pick(batches, 2, 3), KEY)
    for part in ("params", "ema", "optimizer"):
        assert_same_weights(getattr(after, part), getattr(expected, part))
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (3, 1, 1)
    assert (int(report.skipped), int(report.skipped_in_a_row)) == (1, 1)
    healed, report = step(after, FROZEN, pick(batches, 3, 4), KEY)
    assert (int(healed.step), int(healed.skipped), int(healed.skipped_in_a_row)) == (4, 1, 0)
    assert np.isfinite(report.metrics.compute()["loss"])
    assert not np.array_equal(healed.params["w"], expected.params["w"])


def test_figures_average_over_the_finite_updates(step):
    batches = make_batches(3)
    _, whole = step(fresh_state(OPTIMIZER), FROZEN, pick(batches, 0, 2), KEY)
    batches["image"][2] = np.nan
    _, report = step(fresh_state(OPTIMIZER), FROZEN, batches, KEY)
    assert figures(report.metrics) == pytest.approx(figures(whole.metrics), rel=1e-6)


def test_ema_follows_its_recurrence(step):
    batches = make_batches(40)
    state = fresh_state(OPTIMIZER)
    average = np.zeros(FEATURES)
    for n in range(40):
        state, _ = step(state, FROZEN, pick(batches, n, n + 1), KEY)
        decay = min(EMA_DECAY, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * np.asarray(state.params["w"], np.float64)
        np.testing.assert_allclose(state.ema["w"], average, rtol=1e-5)
    assert state.result is state.ema


def test_without_ema_the_result_is_the_weights(mesh_of):
    step = make_train_step(noisy_regression, OPTIMIZER, ema_decay=0.0, mesh=mesh_of(1))
    state = fresh_state(OPTIMIZER, ema_decay=0.0)
    state, _ = step(state, FROZEN, make_batches(2), KEY)
    assert not state.ema
    assert state.result is state.params


def test_state_is_donated_and_what_it_was_made_from_is_kept(mesh_of):
    mesh = mesh_of(1)
    step = make_train_step(noisy_regression, OPTIMIZER, ema_decay=EMA_DECAY, mesh=mesh)
    weights = jax.device_put({"w": jnp.ones(FEATURES), "b": jnp.ones(())}, replicated(mesh))
    frozen = jax.device_put(FROZEN, replicated(mesh))
    state = jax.device_put(initial_state(weights, OPTIMIZER, ema_decay=EMA_DECAY), replicated(mesh))
    step(state, frozen, make_batches(2), KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.ema)))
    np.testing.assert_array_equal(weights["w"], 1.0)
    np.testing.assert_array_equal(frozen["w"], FROZEN["w"])


def test_restored_arrays_can_be_donated(step, tmp_path, mesh_of, assert_same_weights):
    batches = make_batches(4)
    state, _ = step(fresh_state(OPTIMIZER), FROZEN, pick(batches, 0, 2), KEY)
    with StageCheckpoints(epath.Path(tmp_path)) as checkpoints:
        checkpoints.save(state, data_state={}, about={})
        checkpoints.wait()
        restored = checkpoints.restore(abstract(state, replicated(mesh_of(4)))).state
    expected, _ = step(state, FROZEN, pick(batches, 2, 4), KEY)
    actual, _ = step(restored, FROZEN, pick(batches, 2, 4), KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(restored.params))
    assert_same_weights(actual, expected)


def test_number_of_devices_changes_only_rounding(mesh_of):
    ends = []
    for count in (1, 4):
        step = make_train_step(
            noisy_regression, OPTIMIZER, ema_decay=EMA_DECAY, mesh=mesh_of(count)
        )
        ends.append(jax.device_get(step(fresh_state(OPTIMIZER), FROZEN, make_batches(5), KEY)[0]))
    for one, four in zip(*(jax.tree.leaves(each) for each in ends), strict=True):
        np.testing.assert_allclose(one, four, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(("length", "clipped"), [(0.5, 0.5), (4.0, 1.0)])
def test_the_mean_gradient_is_clipped(mesh_of, length, clipped):
    """Examples' own gradients are far longer than the bound; only their mean's length counts."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    step = make_train_step(
        lambda params, frozen, batch, key: Loss(batch["image"] @ params["w"], {}),
        optimizer,
        ema_decay=0.0,
        mesh=mesh_of(4),
    )
    images = np.zeros((1, BATCH, FEATURES), np.float32)
    images[..., 0] = length
    images[:, ::2, 1], images[:, 1::2, 1] = 20.0, -20.0
    batches = {"image": images, "label": np.zeros((1, BATCH), np.int32)}
    state, report = step(fresh_state(optimizer, ema_decay=0.0), {}, batches, KEY)
    np.testing.assert_allclose(state.params["w"], [-clipped, 0.0, 0.0], rtol=1e-6, atol=1e-6)
    assert report.metrics.compute()["gradient_norm"] == pytest.approx(length)


def test_optimizer_is_adam_on_clipped_gradients():
    optimizer = make_optimizer(Optimization(learning_rate=0.1, gradient_clip=1.0), steps=10)
    lengths = np.array([0.1, 5.0, 1.0, 9.0, 2.0, 3.0])
    gradients = lengths[:, None] * np.random.default_rng(0).normal(size=(6, FEATURES))
    w, first, second = np.zeros(FEATURES), np.zeros(FEATURES), np.zeros(FEATURES)
    params = jnp.zeros(FEATURES)
    state = optimizer.init(params)
    for n, gradient in enumerate(gradients, start=1):
        change, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state, params)
        params += change
        gradient = gradient / max(1.0, np.linalg.norm(gradient))
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        w -= 0.1 * (first / (1 - 0.9**n)) / (np.sqrt(second / (1 - 0.999**n)) + 1e-8)
    np.testing.assert_allclose(params, w, rtol=1e-4)


@pytest.mark.parametrize(
    ("schedule", "after_warmup"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [(1 + np.cos(np.pi * share)) / 2 for share in (0.0, 0.25, 0.5, 0.75)]),
    ],
)
def test_learning_rate_warms_up_and_falls(schedule, after_warmup):
    """Under one constant gradient every Adam update is as long as the learning rate."""
    settings = Optimization(
        learning_rate=0.1, learning_rate_schedule=schedule, warmup_steps=2, gradient_clip=9.0
    )
    optimizer = make_optimizer(settings, steps=6)
    params = jnp.zeros(())
    state = optimizer.init(params)
    rates = []
    for _ in range(6):
        change, state = optimizer.update(jnp.ones(()), state, params)
        rates.append(-float(change))
    np.testing.assert_allclose(rates, 0.1 * np.array([0.0, 0.5, *after_warmup]), rtol=1e-4)


def test_halving_rounds_share_one_program(monkeypatch, mesh_of):
    """Another N and another teacher are arguments: they change the loss and trace nothing anew."""
    traces = []

    def counting_loss(*arguments, **options):
        traces.append(options["sampler"])
        return halving_loss(*arguments, **options)

    monkeypatch.setattr(pipeline, "halving_loss", counting_loss)
    network = network_of(
        Model(options={"width": 8, "depth": 1, "embedding_width": 8}), (2,), num_classes=3
    )
    step, optimizer = pipeline.compiled_step(
        "halving",
        Halving(steps=6, ema_decay=EMA_DECAY),
        network,
        mesh_of(4),
        total_steps=6,
        sampler="ddim",
        w_range=(0.0, 4.0),
    )
    rng = np.random.default_rng(3)
    batches = {
        "image": rng.normal(size=(2, BATCH, 2)).astype(np.float32),
        "label": rng.integers(0, 3, (2, BATCH)).astype(np.int32),
    }
    params = network.told_w().init(KEY)
    teacher = jax.tree.map(lambda leaf: leaf + 0.1, params)
    kept = jax.device_get(teacher)
    losses, counts = [], []
    for weights, num_steps in ((params, 2), (teacher, 2), (teacher, 1)):
        state = initial_state(params, optimizer, ema_decay=EMA_DECAY)
        frozen = {"params": weights, "num_steps": jnp.asarray(num_steps, jnp.int32)}
        _, report = step(state, frozen, batches, KEY)
        losses.append(float(report.metrics.compute()["loss"]))
        counts.append(len(traces))
    assert len(set(losses)) == 3
    assert counts[0] == counts[1] == counts[2] > 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(teacher), kept)
