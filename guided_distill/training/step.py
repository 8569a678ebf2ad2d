"""The train step: one function for every stage and every machine."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import clu.metrics
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from guided_distill.objectives.weighting import Loss
from guided_distill.training.mesh import replicated, split_batch
from guided_distill.training.state import TrainState

Batch = Mapping[str, jax.Array]
LossFunction = Callable[[Any, Any, Batch, jax.Array], Loss]
"""(params, frozen params of the teacher, batch, key) -> Loss."""


@functools.cache
def metrics_of(names: tuple[str, ...]) -> type[clu.metrics.Collection]:
    """A collection that averages each of `names` over the finite updates since the last log line."""
    averages = {name: clu.metrics.Average.from_output(name) for name in names}
    return clu.metrics.Collection.create(**averages)


class StepReport(NamedTuple):
    """Figures of a dispatch: averages over its finite updates, and the state's counts of skips."""

    metrics: clu.metrics.Collection
    skipped: jax.Array
    skipped_in_a_row: jax.Array


TrainStep = Callable[[TrainState, Any, Batch, jax.Array], tuple[TrainState, StepReport]]


def make_train_step(
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    mesh: Mesh,
) -> TrainStep:
    """A compiled function that makes K updates in one call.

    It takes (state, frozen, batches, key): the state is donated; `frozen` is the teacher's weights,
    an argument so that they aren't built into the program; batches are arrays [K, B, ...]; `key` is the
    stage's own, and update number n draws from fold_in(key, n). An update whose loss or gradient isn't
    finite is left out and counted.
    """

    def update(
        state: TrainState, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, clu.metrics.Collection]:
        key = jax.random.fold_in(key, state.step)

        def mean_loss(params: Any) -> tuple[jax.Array, Loss]:
            losses = loss(params, frozen, batch, key)
            return losses.per_example.mean(), losses

        (value, losses), gradient = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        change, new_optimizer = optimizer.update(gradient, state.optimizer, state.params)
        params, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (optax.apply_updates(state.params, change), new_optimizer),
            (state.params, state.optimizer),
        )
        # The average warms up with the count of updates, so that short runs forget their start.
        warm_decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        decay = jnp.where(finite, warm_decay, 1.0)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            ema=jax.tree.map(
                lambda average, new: decay * average + (1.0 - decay) * new,
                state.ema,
                params if state.ema else {},
            ),
            optimizer=optimizer_state,
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        figures = {"loss": value, "gradient_norm": norm} | jax.tree.map(jnp.mean, losses.aux)
        metrics = metrics_of(tuple(sorted(figures))).single_from_model_output(
            **jax.tree.map(lambda figure: figure[None], figures), mask=finite[None]
        )
        return new_state, metrics

    def many_updates(
        state: TrainState, frozen: Any, batches: Batch, key: jax.Array
    ) -> tuple[TrainState, StepReport]:
        (count, *_) = batches["image"].shape
        if count == 1:
            # Not a loop: in loops, XLA's CPU backend takes a hundred times longer for the gradient of a
            # convolution's weights.
            only = {name: each[0] for name, each in batches.items()}
            state, metrics = update(state, frozen, only, key)
        else:
            state, stacked = jax.lax.scan(
                lambda state, batch: update(state, frozen, batch, key), state, batches
            )
            metrics = stacked.reduce()
        return state, StepReport(metrics, state.skipped, state.skipped_in_a_row)

    whole, split = replicated(mesh), split_batch(mesh, axis=1)
    return jax.jit(
        many_updates,
        donate_argnums=0,
        in_shardings=(whole, whole, split, whole),
        out_shardings=whole,
    )
