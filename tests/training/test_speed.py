"""The speed in a stage's log: its arithmetic, and where its time goes."""

import threading
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from toy import SETTINGS, job_in, source, train_toy

from guided_distill.chips import peak_flops
from guided_distill.data.pipeline import batches
from guided_distill.objectives.weighting import Loss
from guided_distill.training import speed as speed_module
from guided_distill.training import step as step_module
from guided_distill.training.checkpoints import StageCheckpoints
from guided_distill.training.mesh import data_mesh
from guided_distill.training.record import read_metrics, read_speed
from guided_distill.training.speed import INPUT, Speedometer
from guided_distill.training.state import initial_state
from guided_distill.training.step import make_train_step

WIDTH, BATCH = 128, 1024
SHARES = ("input_share", "checkpoint_share", "compile_share", "profile_share", "goodput")


def matmul(params, frozen, batch, keys):
    return Loss(jnp.square(batch["image"] @ params["a"]).mean(axis=1), {})


def program_and_job(tmp_path, mesh, *, count=1, accumulation=1):
    optimizer = optax.sgd(0.1)
    step = make_train_step(matmul, optimizer, ema_decay=0.0, mesh=mesh, accumulation=accumulation)
    state = initial_state({"a": jnp.zeros((WIDTH, WIDTH))}, optimizer, ema_decay=0.0)
    data = {"image": np.ones((count, BATCH, WIDTH), np.float32)}
    settings = replace(SETTINGS, batch_size=BATCH, accumulation=accumulation)
    return (
        step.lower(state, {}, data, jax.random.key(0)),
        replace(job_in(epath.Path(tmp_path), mesh=mesh), settings=settings),
    )


def figures_of(speed, lowered):
    speed.compile(lowered)
    speed.dispatched(jnp.zeros(()), step=7)
    return speed.figures(7)


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize(
    ("count", "accumulation", "devices"), [(1, 1, 1), (4, 1, 1), (1, 4, 1), (4, 2, 1), (4, 1, 4)]
)
def test_the_flops_of_an_update_match_a_count_by_hand(
    tmp_path, mesh_of, monkeypatch, count, accumulation, devices, looped
):
    """Two matrix products of 2 B D^2 FLOPs, forward and for the weights' gradient, split over devices."""
    for module in (speed_module, step_module):
        monkeypatch.setattr(module, "loops_are_unrolled", lambda mesh: not looped)
    lowered, job = program_and_job(
        tmp_path, mesh_of(devices), count=count, accumulation=accumulation
    )
    with Speedometer(job, step=0) as speed:
        figures = figures_of(speed, lowered)
    of_update = figures["flops_per_second"] / figures["updates_per_second"]
    assert of_update == pytest.approx(2 * 2 * BATCH * WIDTH**2 / devices, rel=0.03)
    assert figures["examples_per_second"] == pytest.approx(BATCH * figures["updates_per_second"])


def test_utilization_is_relative_to_the_peak_where_it_is_known(tmp_path, mesh_of, monkeypatch):
    lowered, job = program_and_job(tmp_path, mesh_of(1))
    for peak in (None, 1e12):
        monkeypatch.setattr(speed_module, "peak_flops", lambda kind, peak=peak: peak)
        with Speedometer(job, step=0) as speed:
            figures = figures_of(speed, lowered)
        if peak is None:
            assert "flops_utilization" not in figures
        else:
            assert figures["flops_utilization"] == pytest.approx(figures["flops_per_second"] / peak)
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops(jax.devices()[0].device_kind) is None


class Slow:
    """The batches of an iterator, each after a pause."""

    def __init__(self, seconds):
        self._iterator, self._seconds = (
            batches(source(with_nan=False), batch_size=8, seed=3),
            seconds,
        )
        self.get_state, self.set_state = self._iterator.get_state, self._iterator.set_state

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(self._seconds)
        return next(self._iterator)


def assert_shares_sum_to_one(rows):
    for row in rows:
        assert all(0 <= row[name] <= 1 for name in SHARES)
        assert sum(row[name] for name in SHARES) == pytest.approx(1)


def test_every_row_of_metrics_has_its_speed_and_shares_sum_to_one(tmp_path):
    directory = epath.Path(tmp_path)
    train_toy(directory, data=source(with_nan=True), total_steps=9)
    rows = read_speed(directory)
    assert [row["step"] for row in rows] == [row["step"] for row in read_metrics(directory)]
    assert_shares_sum_to_one(rows)
    assert rows[0]["compile_share"] > rows[1]["compile_share"] == 0
    assert all(row["updates_per_second"] > 0 for row in rows)


def seconds_of(rows, share):
    """Return the seconds that a share makes up, over all rows but the first, which includes compiling."""
    steps = [row["step"] for row in rows]
    return sum(
        row[share] * (step - before) / row["updates_per_second"]
        for before, step, row in zip(steps, steps[1:], rows[1:], strict=False)
    )


def test_slow_data_raise_the_share_of_input(tmp_path):
    """Of the 3 s for which the data pause after the first row, most aren't hidden by other work."""
    rows = {}
    for name, data in (("slow", Slow(0.3)), ("fast", source(with_nan=False))):
        train_toy(epath.Path(tmp_path / name), data=data)
        rows[name] = read_speed(epath.Path(tmp_path / name))
        assert_shares_sum_to_one(rows[name])
    slow, fast = (seconds_of(rows[name], "input_share") for name in ("slow", "fast"))
    assert slow > max(1.0, fast)


def test_slow_saves_raise_the_share_of_checkpoints(tmp_path, monkeypatch):
    save = StageCheckpoints.save

    def slow(*arguments, **options):
        time.sleep(1.0)
        save(*arguments, **options)

    monkeypatch.setattr(StageCheckpoints, "save", slow)
    train_toy(epath.Path(tmp_path), data=source(with_nan=False))
    rows = read_speed(epath.Path(tmp_path))
    assert_shares_sum_to_one(rows)
    # Saves follow the rows at 4, 8 and 12.
    assert [row["step"] for row in rows if row["checkpoint_share"]] == [6, 10]
    assert seconds_of(rows, "checkpoint_share") > 2.0


def test_input_counts_only_while_the_devices_have_nothing_to_do(tmp_path, monkeypatch):
    """The third batch takes 1 s, in the first half of which the second dispatch still runs."""
    finish = {name: threading.Event() for name in ("first", "second", "third")}
    monkeypatch.setattr(
        speed_module, "_finish_time", lambda report: finish[report].wait() and time.monotonic()
    )
    with Speedometer(job_in(epath.Path(tmp_path), mesh=data_mesh()), step=0) as speed:
        speed.dispatched("first", step=2)
        with speed.spending(INPUT):
            time.sleep(0.1)
        speed.dispatched("second", step=4)
        finish["first"].set()
        assert speed.figures(2)["input_share"] == 0
        with speed.spending(INPUT):
            time.sleep(0.5)
            finish["second"].set()
            time.sleep(0.5)
        speed.dispatched("third", step=6)
        finish["third"].set()
        assert speed.figures(4)["input_share"] == 0
        assert speed.figures(6)["input_share"] > 0.9


def test_counting_flops_compiles_nothing_more(tmp_path, caplog):
    step_of_toy = {"data": source(with_nan=False), "total_steps": 5}
    jax.clear_caches()
    with jax.log_compiles():
        train_toy(epath.Path(tmp_path), **step_of_toy)
    compiled = [
        each for each in caplog.messages if "Finished XLA compilation of jit(many_updates)" in each
    ]
    # Two dispatches of two updates share a program; the last dispatch has one update.
    assert len(compiled) == 2
