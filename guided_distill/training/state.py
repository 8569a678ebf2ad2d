"""The train state and its optimizer."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from guided_distill.objectives.stage import Optimization
from guided_distill.training.mesh import split_weights


@flax.struct.dataclass
class TrainState:
    """The weights and optimizer state of a stage after `step` updates.

    ema: the exponential moving average of the weights; an empty tree if the stage keeps none.
    skipped, skipped_in_a_row: updates skipped because the loss or gradient wasn't finite.
    """

    step: jax.Array
    params: Any
    ema: Any
    optimizer: Any
    skipped: jax.Array
    skipped_in_a_row: jax.Array

    @property
    def result(self) -> Any:
        """The weights that the stage passes on to the next one: the average if there is one."""
        return self.ema or self.params


def make_optimizer(settings: Optimization, *, steps: int) -> optax.GradientTransformation:
    """Return Adam with decoupled weight decay, after clipping by the mean gradient's global norm.

    steps: the number of updates over which the learning rate warms up and decays.
    """
    decay_steps = steps - settings.warmup_steps
    peak = settings.learning_rate
    after_warmup = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps),
    }[settings.learning_rate_schedule]
    warmup = optax.linear_schedule(0.0, peak, settings.warmup_steps)
    learning_rate = optax.join_schedules([warmup, after_warmup], [settings.warmup_steps])
    return optax.chain(
        optax.clip_by_global_norm(settings.gradient_clip),
        optax.adamw(learning_rate, weight_decay=settings.weight_decay),
    )


def initial_state(
    params: Any, optimizer: optax.GradientTransformation, *, ema_decay: float
) -> TrainState:
    """Return the state before the first update. Its arrays are copies, so it can be donated."""
    # Each counter is a separate array because the same buffer can't be donated twice.
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=jax.tree.map(jnp.copy, params),
        ema=jax.tree.map(jnp.copy, params) if ema_decay else {},
        optimizer=optimizer.init(params),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("optimizer", "ema_decay", "mesh"))
def split_initial_state(
    params: Any, *, optimizer: optax.GradientTransformation, ema_decay: float, mesh: Mesh
) -> TrainState:
    """Return `initial_state`, created with its final sharding, so that no device ever holds it whole."""
    state = initial_state(params, optimizer, ema_decay=ema_decay)
    return jax.lax.with_sharding_constraint(state, split_weights(mesh, state))
