"""A training job: its memory when it resumes, and results that it must not save."""

import dataclasses
import gc
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from toy import SETTINGS

from guided_distill.data.source import from_arrays
from guided_distill.errors import UserError
from guided_distill.objectives.weighting import Loss
from guided_distill.training.job import Cadence, Job
from guided_distill.training.mesh import data_mesh
from guided_distill.training.record import latest_step
from guided_distill.training.session import train_in
from guided_distill.training.state import make_optimizer
from guided_distill.training.step import make_train_step

WEIGHTS = 2**18
STATE = 4 * 4 * WEIGHTS
"""Bytes of the weights, their average and Adam's two moments."""


def initial():
    return {"a": jnp.full(WEIGHTS, 0.5)}


def never():
    pytest.fail("a resumed stage created new weights")


def regression(params, frozen, batch, key):
    return Loss(jnp.square(batch["image"].mean(axis=1) - params["a"].mean()), {})


def train_large(
    directory, *, steps, start=initial, settings=SETTINGS, value=1.0, begun=lambda: None
):
    mesh = data_mesh()
    optimizer = make_optimizer(settings, steps=steps)
    compiled = make_train_step(regression, optimizer, ema_decay=settings.ema_decay, mesh=mesh)

    def step(*arguments):
        begun()
        return compiled(*arguments)

    step.lower = compiled.lower
    images = np.full((24, 2), value, np.float32)
    job = Job(
        directory,
        title="large",
        about={"stage": "large"},
        settings=settings,
        total_steps=steps,
        seed=0,
        key=jax.random.key(0),
        cadence=Cadence(
            steps_per_dispatch=1,
            log_every=1,
            checkpoint_every=1,
            checkpoints_to_keep=2,
            max_nonfinite_steps=100,
        ),
        mesh=mesh,
    )
    source = from_arrays(
        "large", split="train", images=images, labels=np.zeros(24), class_names=["only"]
    )
    return train_in(
        job,
        source,
        (step, optimizer),
        shapes=jax.eval_shape(initial),
        initial=start,
        frozen={},
    )


def live_bytes():
    return sum(each.nbytes for each in jax.live_arrays())


def test_a_resume_holds_one_state_and_little_more(tmp_path):
    directory = epath.Path(tmp_path)
    train_large(directory, steps=1)
    gc.collect()
    before, most, over = live_bytes(), [0], threading.Event()

    def watch():
        while not over.is_set():
            most.append(live_bytes() - before)

    def begun():
        most.append(live_bytes() - before)
        # After this, a save makes copies, which are on the host.
        over.set()

    thread = threading.Thread(target=watch)
    thread.start()
    train_large(directory, steps=2, start=never, begun=begun)
    thread.join()
    assert STATE <= max(most) <= 1.25 * STATE


@pytest.mark.parametrize("options", [{"learning_rate": np.inf}, {"weight_decay": np.nan}], ids=str)
def test_weights_that_are_not_finite_are_not_saved(tmp_path, options):
    with pytest.raises(UserError, match=r"not finite at step 1.*lower learning_rate"):
        train_large(
            epath.Path(tmp_path), steps=2, settings=dataclasses.replace(SETTINGS, **options)
        )
    assert latest_step(epath.Path(tmp_path)) is None


def test_a_stage_that_skips_all_its_updates_is_not_finished(tmp_path):
    with pytest.raises(UserError, match="not finite for 2 updates in a row before step 2"):
        train_large(epath.Path(tmp_path), steps=2, value=np.nan)
    assert latest_step(epath.Path(tmp_path)) != 2
