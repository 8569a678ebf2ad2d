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
from guided_distill.training.mesh import replicated, split_batch, split_weights
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
    accumulation: int = 1,
    rounded: Callable[[Any], Any] = lambda params: params,
) -> TrainStep:
    """A compiled function that makes K updates in one call.

    It takes (state, frozen, batches, key): the state is donated; `frozen` is the teacher's weights,
    an argument so that they aren't built into the program; batches are arrays [K, B, ...]; `key` is the
    stage's own, and update number n draws from fold_in(key, n). An update whose loss or gradient isn't
    finite is left out and counted. accumulation: in how many parts, one after the other, a batch's
    gradient is computed; it divides B, and the parts draw from keys of their own.

    Weights live as `split_weights` says, in float32. A network sees them whole and `rounded` to what it
    computes in, gathered once an update, so that what it computes stays split by example and the
    partitioner has nothing else to move.
    """

    # In loops, XLA's CPU backend takes a hundred times longer for the gradient of a convolution.
    slow_loops = mesh.devices.flat[0].platform == "cpu"

    def whole(tree: Any) -> Any:
        return jax.lax.with_sharding_constraint(tree, replicated(mesh))

    def split(tree: Any) -> Any:
        return jax.lax.with_sharding_constraint(tree, split_weights(mesh, tree))

    def gradient_of(
        params: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[Any, dict[str, jax.Array]]:
        """The gradient of the mean loss, split like the weights, and figures to log."""

        def mean_loss(params: Any) -> tuple[jax.Array, Loss]:
            losses = loss(params, frozen, batch, key)
            return losses.per_example.mean(), losses

        (value, losses), gradient = jax.value_and_grad(mean_loss, has_aux=True)(params)
        # Whole first: asked for parts alone, the partitioner would split the backward pass by channel.
        return split(whole(gradient)), {"loss": value} | jax.tree.map(jnp.mean, dict(losses.aux))

    def accumulated_gradient(
        params: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[Any, dict[str, jax.Array]]:
        # Every part takes some examples of each device, so that none has to move.
        parts = jax.tree.map(
            lambda each: jnp.moveaxis(each.reshape(-1, accumulation, *each.shape[1:]), 1, 0),
            dict(batch),
        )

        def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
            examples, index = part
            gradient, figures = gradient_of(
                params, frozen, examples, jax.random.fold_in(key, index)
            )
            return jax.tree.map(jnp.add, total, gradient), figures

        zero = split(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params))
        total, figures = jax.lax.scan(
            add, zero, (parts, jnp.arange(accumulation)), unroll=slow_loops
        )
        mean = jax.tree.map(lambda leaf: leaf / accumulation, total)
        return mean, jax.tree.map(jnp.mean, figures)

    def update(
        state: TrainState, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, clu.metrics.Collection]:
        key = jax.random.fold_in(key, state.step)
        compute = gradient_of if accumulation == 1 else accumulated_gradient
        gradient, figures = compute(whole(rounded(state.params)), whole(frozen), batch, key)
        gradient = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(figures["loss"]) & jnp.isfinite(norm)
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
        figures["gradient_norm"] = norm
        metrics = metrics_of(tuple(sorted(figures))).single_from_model_output(
            **jax.tree.map(lambda figure: figure[None], figures), mask=finite[None]
        )
        return split(new_state), metrics

    def many_updates(
        state: TrainState, frozen: Any, batches: Batch, key: jax.Array
    ) -> tuple[TrainState, StepReport]:
        (count, *_) = batches["image"].shape
        if count == 1:
            # Not a loop: see slow_loops.
            only = {name: each[0] for name, each in batches.items()}
            state, metrics = update(state, frozen, only, key)
        else:
            state, stacked = jax.lax.scan(
                lambda state, batch: update(state, frozen, batch, key), state, batches
            )
            metrics = stacked.reduce()
        return state, StepReport(metrics, state.skipped, state.skipped_in_a_row)

    return jax.jit(
        many_updates,
        donate_argnums=0,
        # The weights' shardings are those they come with.
        in_shardings=(None, None, split_batch(mesh, axis=1), replicated(mesh)),
        out_shardings=(None, replicated(mesh)),
    )
