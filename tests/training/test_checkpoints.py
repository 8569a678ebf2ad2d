"""What a damaged or unwritable disk does to a stage's checkpoints."""

import json
import logging
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from guided_distill.config import Optimization, parse
from guided_distill.errors import UserError
from guided_distill.training.checkpoints import StageCheckpoints, abstract, latest_step
from guided_distill.training.state import initial_state, make_optimizer
from guided_distill.training.trained import Description

STEPS = (2, 4, 6)


def state_of(step, *, size=64):
    """A state whose every array tells its step."""
    rng = np.random.default_rng(step)
    params = {"layer": {"kernel": jnp.asarray(rng.normal(size=(size, size)), jnp.float32)}}
    state = initial_state(params, make_optimizer(Optimization(), steps=10), ema_decay=0.9)
    return state.replace(step=jnp.asarray(step, jnp.int32))


def save(directory, *states):
    with StageCheckpoints(directory) as checkpoints:
        for state in states:
            step = int(state.step)
            checkpoints.save(state, data_state={"next_index": step}, about={"about": step})


def restore(directory, *, size=64):
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec())
    with StageCheckpoints(directory) as checkpoints:
        return checkpoints.restore(abstract(state_of(0, size=size), sharding))


@pytest.fixture
def saved(tmp_path):
    directory = epath.Path(tmp_path) / "stage"
    save(directory, *(state_of(step) for step in STEPS))
    return directory


def step_folder(directory, step):
    return Path(directory) / "checkpoints" / str(step)


def largest_file(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def truncate_largest_file(folder):
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete_largest_file(folder):
    largest_file(folder).unlink()


def truncate_optimizer(folder):
    truncate_largest_file(folder / "rest")


def truncate_data_state(folder):
    (folder / "data" / "metadata").write_bytes(b'{"next')


def empty_folder(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = [
    truncate_largest_file,
    delete_largest_file,
    truncate_optimizer,
    truncate_data_state,
    empty_folder,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_read(saved, damage, caplog):
    damage(step_folder(saved, 6))
    with caplog.at_level(logging.WARNING, logger="guided_distill"):
        restored = restore(saved)
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_of(4))
    assert (restored.data_state, restored.about) == ({"next_index": 4}, {"about": 4})
    (record,) = [each for each in caplog.records if each.name.startswith("guided_distill")]
    assert "step 6" in record.getMessage()
    assert "step 4 is read instead" in record.getMessage()
    assert not step_folder(saved, 6).exists()
    assert (saved / "damaged" / "6-0").exists()
    save(saved, state_of(6))
    jax.tree.map(np.testing.assert_array_equal, restore(saved).state, state_of(6))


def test_with_every_checkpoint_damaged_the_stage_starts_again(saved, caplog):
    for step in STEPS:
        truncate_largest_file(step_folder(saved, step))
    with caplog.at_level(logging.WARNING, logger="guided_distill"):
        assert restore(saved) is None
    assert "the stage starts again" in caplog.messages[-1]
    assert len(list((saved / "damaged").iterdir())) == 3
    assert latest_step(saved) is None


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path):
    assert restore(epath.Path(tmp_path) / "stage") is None


def test_another_network_is_an_error_and_moves_nothing(saved):
    with pytest.raises(UserError, match="another network"):
        restore(saved, size=32)
    assert not (saved / "damaged").exists()
    assert latest_step(saved) == 6


def test_a_write_that_fails_is_one_sentence_and_loses_nothing(saved):
    """A limit on the size of files stands for a full disk: the system refuses the write alike."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="can't be written .* make room") as caught:
            save(saved, state_of(8, size=1024))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    jax.tree.map(np.testing.assert_array_equal, restore(saved).state, state_of(6))
    save(saved, state_of(8))
    assert int(restore(saved).state.step) == 8


def test_a_checkpoint_holds_the_states_arrays_and_no_others(saved):
    """A student's checkpoint must not carry its teacher: weights, average, Adam's two moments."""
    folder = step_folder(saved, 6)
    items = {path.name for path in folder.iterdir() if path.is_dir()}
    assert items == {"params", "ema", "rest", "data", "about", "layout"}
    weights = 64 * 64 * 4
    stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert 3.5 * weights < stored < 4.5 * weights + 30_000


def test_description_survives_json():
    about = Description(
        stage="halving",
        total_steps=8,
        num_steps=2,
        sampler="stochastic",
        w_min=0.0,
        w_max=4.0,
        data_shape=(8, 8, 1),
        class_names=("zero", "one"),
        teacher={"path": "run/guidance", "step": 4},
        package_version="1.2.3",
        experiment=parse(
            {"model": {"schedule": "cosine", "parameterization": "eps", "options": {"sizes": (1, 2)}}}
        ),
    )
    assert Description.from_json(json.loads(json.dumps(about.to_json()))) == about
