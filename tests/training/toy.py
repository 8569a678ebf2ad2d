"""A regression with two weights: the whole training code, in no time."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np

from guided_distill.data.pipeline import batches
from guided_distill.data.source import from_arrays
from guided_distill.objectives.stage import Optimization
from guided_distill.objectives.weighting import Loss
from guided_distill.training.checkpoints import StageCheckpoints, abstract
from guided_distill.training.job import UNMONITORED, Cadence, Job
from guided_distill.training.loop import train
from guided_distill.training.mesh import data_mesh, replicated
from guided_distill.training.metrics import MetricsLog
from guided_distill.training.session import further_writers
from guided_distill.training.state import initial_state, make_optimizer
from guided_distill.training.step import make_train_step

SETTINGS = Optimization(
    steps=20, batch_size=8, learning_rate=0.1, learning_rate_schedule="cosine", ema_decay=0.9
)
OPTIMIZER = make_optimizer(SETTINGS, steps=20)
FROZEN = {"shift": np.float32(1.0)}
KEY = 7


def loss(params, frozen, batch, keys):
    noise = 0.1 * jax.vmap(jax.random.normal)(keys)
    return Loss(jnp.square(batch["image"] @ params["a"] + frozen["shift"] + noise), {})


@functools.cache
def step_on(mesh):
    return make_train_step(loss, OPTIMIZER, ema_decay=SETTINGS.ema_decay, mesh=mesh)


def fresh_state(mesh):
    state = initial_state({"a": jnp.arange(2.0)}, OPTIMIZER, ema_decay=SETTINGS.ema_decay)
    return jax.device_put(state, replicated(mesh))


def random_batches(count):
    """Return `count` stacked batches of eight examples."""
    images = np.random.default_rng(0).normal(size=(count, 8, 2)).astype(np.float32)
    return {"image": images, "label": np.zeros((count, 8), np.int32)}


def source(*, with_nan):
    """Return a source with three batches per epoch; with_nan: one of them isn't finite."""
    images = np.random.default_rng(1).normal(size=(24, 2)).astype(np.float32)
    if with_nan:
        images[5] = np.nan
    return from_arrays(
        "toy", split="train", images=images, labels=np.zeros(24), class_names=["only"]
    )


def job_in(
    directory, *, mesh, total_steps=12, log_every=2, max_nonfinite_steps=3, monitoring=UNMONITORED
):
    """Return the job of the regression."""
    return Job(
        directory,
        title="toy",
        about={"stage": "toy"},
        settings=SETTINGS,
        total_steps=total_steps,
        seed=KEY,
        key=jax.random.key(KEY),
        cadence=Cadence(
            steps_per_dispatch=2,
            log_every=log_every,
            checkpoint_every=4,
            checkpoints_to_keep=2,
            max_nonfinite_steps=max_nonfinite_steps,
        ),
        mesh=mesh,
        monitoring=monitoring,
    )


def train_toy(
    directory, *, data, total_steps=12, log_every=2, max_nonfinite_steps=3, monitoring=UNMONITORED
):
    """Train, resuming from a checkpoint if there is one; return the state and the input pipeline's."""
    mesh = data_mesh()
    state = fresh_state(mesh)
    frozen = jax.device_put(FROZEN, replicated(mesh))
    job = job_in(
        directory,
        mesh=mesh,
        total_steps=total_steps,
        log_every=log_every,
        max_nonfinite_steps=max_nonfinite_steps,
        monitoring=monitoring,
    )
    with contextlib.ExitStack() as stack:
        iterator = data
        if not hasattr(data, "__next__"):
            iterator = batches(data, batch_size=8, seed=3)
            stack.enter_context(contextlib.closing(iterator))
        checkpoints = stack.enter_context(
            StageCheckpoints(directory, keep=2, total_steps=total_steps)
        )
        restored = checkpoints.restore(abstract(state, mesh))
        if restored is not None:
            state = restored.state
            iterator.set_state(restored.data_state)
        log = MetricsLog(
            directory,
            step=int(state.step),
            unlogged=restored.unlogged if restored else (),
            writers=further_writers(job, int(state.step)),
        )
        stack.enter_context(contextlib.closing(log))
        # The loop makes no implicit transfers between host and device.
        stack.enter_context(jax.transfer_guard("disallow"))
        state = train(
            job,
            state,
            step_on(mesh),
            frozen=frozen,
            batches=iterator,
            checkpoints=checkpoints,
            log=log,
        )
        return state, iterator.get_state()
