"""Training on eight simulated devices gives the same result for every sharding, and in bfloat16."""

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from guided_distill.config import Model, parse
from guided_distill.errors import UserError
from guided_distill.models.outline import Outline
from guided_distill.objectives.halving import HalvingStage
from guided_distill.plan.measured import collectives_of
from guided_distill.runs.trained import network_of
from guided_distill.stages import compiled_step
from guided_distill.training.checkpoints import StageCheckpoints, abstract
from guided_distill.training.mesh import data_mesh, split_weights
from guided_distill.training.state import initial_state

UPDATES, BATCH = 10, 16
SHAPE, NUM_CLASSES = (8, 8, 3), 10
MLP = {"width": 32, "depth": 1, "embedding_width": 16}
EXPERIMENT = parse(
    {
        "model": {
            "name": "unet",
            "options": {
                "width": 16,
                "channel_multipliers": (1,),
                "blocks_per_level": 1,
                "attention_resolutions": (8,),
                "head_width": 16,
                "embedding_width": 32,
            },
        },
        "halving": {"steps": UPDATES, "batch_size": BATCH, "learning_rate": 1e-3},
    }
)


class Run(NamedTuple):
    losses: np.ndarray
    state: object
    start: object
    program: str
    flops: float
    said: str


@contextlib.contextmanager
def errors_said() -> Iterator[list[str]]:
    """Yield a list, to which the block's standard error is added, including the compiler's messages."""
    said: list[str] = []
    with tempfile.TemporaryFile("w+") as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            said.append(file.read())


@pytest.fixture(scope="module")
def run(mesh_of):
    """f(devices, fsdp, ...): a halving round on this number of devices."""

    @functools.cache
    def run_on(devices, fsdp=1, *, accumulation=1, dtype="float32", small=False):
        mesh = mesh_of(devices, fsdp=fsdp)
        model = Model("mlp", options=MLP) if small else replace(EXPERIMENT.model, dtype=dtype)
        network = network_of(model, Outline(SHAPE, NUM_CLASSES)).conditioned_on_w()
        rng = np.random.default_rng(0)
        # No weight is zero, as some are at initialization: their gradients would be only rounding errors.
        params, tutor = (
            jax.tree.map(
                lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32),
                jax.eval_shape(network.init, jax.random.key(0)),
            )
            for _ in range(2)
        )
        settings = parse({"halving": {"accumulation": accumulation}}).halving
        step, optimizer = compiled_step(
            HalvingStage(settings, UPDATES, (0.0, 4.0), sampler="ddim"),
            student=network,
            teacher=network,
            mesh=mesh,
        )
        state = initial_state(params, optimizer, ema_decay=0.9)
        state = jax.device_put(state, split_weights(mesh, state))
        frozen = {
            "params": network.rounded(tutor),
            "num_steps": jnp.asarray(4, jnp.int32),
            "null": None,
        }
        frozen = jax.device_put(frozen, split_weights(mesh, frozen))
        batch = {
            "image": rng.uniform(-1, 1, (1, BATCH, *SHAPE)).astype(np.float32),
            "label": rng.integers(0, NUM_CLASSES, (1, BATCH), np.int32),
        }
        with errors_said() as said:
            program = step.lower(state, frozen, batch, jax.random.key(0)).compile()
        losses = []
        for _ in range(UPDATES):
            state, report = program(state, frozen, batch, jax.random.key(0))
            losses.append(report.metrics.compute()["loss"])
        flops = program.cost_analysis()["flops"]
        return Run(np.array(losses), state, params, program.as_text(), flops, "".join(said))

    return run_on


def difference(one, other):
    """Return the distance between two trees of weights."""
    squares = jax.tree.map(lambda a, b: np.square(np.asarray(a) - np.asarray(b)).sum(), one, other)
    return float(np.sqrt(sum(jax.tree.leaves(squares))))


@pytest.mark.parametrize("fsdp", [1, 8, 2])
def test_training_is_the_same_as_on_one_device(run, fsdp):
    alone, together = run(1), run(8, fsdp)
    np.testing.assert_allclose(together.losses, alone.losses, rtol=1e-5)
    moved = difference(alone.state.params, alone.start)
    assert moved > 0.1
    assert difference(together.state.params, alone.state.params) < 0.02 * moved
    assert len(set(alone.losses)) == UPDATES


def test_split_weights_take_an_eighth_of_the_memory(run):
    leaves = jax.tree.leaves(run(8, 8).state)
    whole = sum(leaf.nbytes for leaf in leaves)
    own = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    assert own < (1 / 8 + 0.1) * whole
    copied = jax.tree.leaves(run(8, 1).state)
    assert sum(leaf.addressable_shards[0].data.nbytes for leaf in copied) == whole


@pytest.mark.parametrize("fsdp", [1, 8, 2])
def test_only_weights_and_gradients_are_communicated(run, fsdp):
    program = run(8, fsdp).program
    assert "all-to-all" not in program
    assert "collective-permute" not in program
    assert ("all-gather" in program) == (fsdp > 1)


@pytest.mark.parametrize("fsdp", [8, 2])
def test_splitting_weights_adds_no_work(run, fsdp):
    copied, split = run(8, 1), run(8, fsdp)
    # It can be less, because a device updates only its own part of the weights.
    assert 0.9 * copied.flops < split.flops < 1.02 * copied.flops
    # The teacher's weights and the student's, each once.
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(split.start))
    assert collectives_of(split.program)["all-gather"].bytes <= 2.1 * weights
    assert "involuntary" not in split.said.lower()


def test_an_accumulated_gradient_is_the_mean_of_its_parts(run):
    whole = run(1, small=True)
    one, eight = run(1, accumulation=2, small=True), run(8, 8, accumulation=2, small=True)
    np.testing.assert_allclose(eight.losses, one.losses, rtol=1e-5)
    # An example's noise doesn't depend on the part that it is in.
    np.testing.assert_allclose(one.losses, whole.losses, rtol=1e-5)


def test_bfloat16_trains_like_float32_up_to_rounding(run):
    """With eight bits of mantissa, each of a network's many roundings has a relative error of 0.4 %."""
    exact, rough = run(1), run(1, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(rough.state.params)} == {"float32"}
    errors = abs(rough.losses / exact.losses - 1)
    assert 1e-4 < errors.max() < 0.03
    moved = difference(exact.state.params, exact.start)
    # Adam's steps have the same size even where a gradient is only rounding errors.
    assert difference(rough.state.params, exact.state.params) < 0.3 * moved


def test_another_mesh_restores_a_checkpoint(run, mesh_of, tmp_path):
    state = run(8, 8).state
    with StageCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(state, data_state={}, about={})
        checkpoints.wait()
        for mesh in (mesh_of(4, fsdp=2), mesh_of(1)):
            read = checkpoints.restore(abstract(state, mesh)).state
            jax.tree.map(np.testing.assert_array_equal, read, state)
            expected = jax.tree.leaves(split_weights(mesh, state))
            assert [leaf.sharding for leaf in jax.tree.leaves(read)] == expected


def test_fsdp_that_does_not_divide_the_devices_is_refused(mesh_of):
    with pytest.raises(UserError, match=r"config.fsdp is 3, which doesn't divide 8 devices"):
        mesh_of(8, fsdp=3)


@dataclass(frozen=True)
class Fake:
    """A device of one of several slices, as JAX describes it."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "fake"


def test_weights_are_split_over_devices_of_one_slice():
    devices = [Fake(number, slice_index=number % 2) for number in range(8)]
    for fsdp, shape in ((0, (2, 4)), (2, (4, 2)), (1, (8, 1))):
        mesh = data_mesh(devices, fsdp=fsdp)
        assert mesh.devices.shape == shape
        slices = [[each.slice_index for each in row] for row in mesh.devices]
        assert slices == [[0] * shape[1]] * (shape[0] // 2) + [[1] * shape[1]] * (shape[0] // 2)
    with pytest.raises(
        UserError, match=r"config.fsdp is 8, which doesn't divide 4 devices of a slice"
    ):
        data_mesh(devices, fsdp=8)
