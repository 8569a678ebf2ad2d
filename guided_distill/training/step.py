"""The train step, the same for every stage and every machine."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import clu.metrics
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from guided_distill.objectives.stage import Batch, LossFunction
from guided_distill.objectives.weighting import Loss
from guided_distill.training.mesh import (
    EXAMPLES,
    mean_over_devices,
    replicated,
    split_batch,
    split_weights,
)
from guided_distill.training.state import TrainState


@functools.cache
def metrics_of(names: tuple[str, ...]) -> type[clu.metrics.Collection]:
    """Return a collection that averages each named metric over the finite updates since the last log."""
    averages = {name: clu.metrics.Average.from_output(name) for name in names}
    return clu.metrics.Collection.create(**averages)


class StepReport(NamedTuple):
    """Metrics of a dispatch, averaged over its finite updates, and the counts of skipped updates."""

    metrics: clu.metrics.Collection
    skipped: jax.Array
    skipped_in_a_row: jax.Array


class TrainStep(Protocol):
    """A compiled function of (state, frozen, batches, key): see `make_train_step`."""

    def __call__(
        self, state: TrainState, frozen: Any, batches: Batch, key: jax.Array, /
    ) -> tuple[TrainState, StepReport]:
        """Make the updates of a dispatch."""
        ...

    def lower(
        self, state: TrainState, frozen: Any, batches: Batch, key: jax.Array, /
    ) -> jax.stages.Lowered:
        """Trace the function without running it; the arguments may be shapes."""
        ...


Figures = dict[str, jax.Array]


def make_train_step(
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    mesh: Mesh,
    accumulation: int = 1,
    rounded: Callable[[Any], Any] = lambda params: params,
) -> TrainStep:
    """Return a compiled function that makes K updates in one call.

    It takes (state, frozen, batches, key) and donates the state. `frozen` holds the teacher's weights;
    they are an argument so that they don't become constants of the program. The loss also finds there the
    number of updates so far, "update". batches: arrays [K, B, ...].
    key: the stage's key; example b of update n uses key b of split(fold_in(key, n), B). Updates whose
    loss or gradient isn't finite are skipped and counted. accumulation: the number of sequential parts in
    which a batch's gradient is computed; it must divide the number of examples per device.

    The weights are float32 and sharded by `split_weights`. Once per update they are gathered and
    converted by `rounded` to the network's dtype. Each device computes the gradient of its own examples,
    and the gradients are averaged in float32.
    """
    gradient = functools.partial(
        accumulated_gradient, loss, accumulation=accumulation, unroll=loops_are_unrolled(mesh)
    )

    def whole(tree: Any) -> Any:
        return jax.lax.with_sharding_constraint(tree, replicated(mesh))

    def mean_gradient(
        params: Any, frozen: Any, batch: Batch, keys: jax.Array
    ) -> tuple[Any, Figures]:
        """Return the mean loss's gradient over all devices, sharded like the weights, and metrics."""
        split = jax.tree.map(lambda place: place.spec, split_weights(mesh, params))

        def of_device(*arguments: Any) -> tuple[Any, Figures]:
            own, figures = gradient(*arguments)
            everywhere = jax.tree.map(lambda _: PartitionSpec(), figures)
            return mean_over_devices(own, split), mean_over_devices(figures, everywhere)

        return jax.shard_map(
            of_device,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(), EXAMPLES, EXAMPLES),
            out_specs=(split, PartitionSpec()),
            # Otherwise JAX sums the gradient of replicated weights by itself, in their precision.
            check_vma=False,
        )(params, frozen, dict(batch), keys)

    def update(
        state: TrainState, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, clu.metrics.Collection]:
        keys = jax.random.split(jax.random.fold_in(key, state.step), len(batch["image"]))
        known = whole({**frozen, "update": state.step})
        gradient, figures = mean_gradient(whole(rounded(state.params)), known, batch, keys)
        figures["gradient_norm"] = optax.tree.norm(gradient)
        finite = jnp.isfinite(figures["loss"]) & jnp.isfinite(figures["gradient_norm"])
        new_state = updated(state, gradient, optimizer, finite=finite, ema_decay=ema_decay)
        metrics = metrics_of(tuple(sorted(figures))).single_from_model_output(
            **jax.tree.map(lambda figure: figure[None], figures), mask=finite[None]
        )
        places = split_weights(mesh, new_state)
        return jax.lax.with_sharding_constraint(new_state, places), metrics

    def many_updates(
        state: TrainState, frozen: Any, batches: Batch, key: jax.Array
    ) -> tuple[TrainState, StepReport]:
        (count, *_) = batches["image"].shape
        if count == 1:
            # Avoids a loop: see loops_are_unrolled.
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
        # None keeps the shardings that the weights have already.
        in_shardings=(None, None, split_batch(mesh, axis=1), replicated(mesh)),
        out_shardings=(None, replicated(mesh)),
    )


def loops_are_unrolled(mesh: Mesh) -> bool:
    """Whether the parts of a batch are computed without a loop."""
    # XLA's CPU backend computes the gradient of a convolution a hundred times slower inside a loop.
    return mesh.devices.flat[0].platform == "cpu"


def gradient_of(
    loss: LossFunction, params: Any, frozen: Any, batch: Batch, keys: jax.Array
) -> tuple[Any, Figures]:
    """Return the float32 gradient of the mean loss of a batch [B, ...] with keys [B], and metrics."""

    def mean_loss(params: Any) -> tuple[jax.Array, Loss]:
        losses = loss(params, frozen, batch, keys)
        return losses.per_example.mean(), losses

    (value, losses), gradient = jax.value_and_grad(mean_loss, has_aux=True)(params)
    gradient = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient)
    return gradient, {"loss": value} | jax.tree.map(jnp.mean, dict(losses.aux))


def accumulated_gradient(
    loss: LossFunction,
    params: Any,
    frozen: Any,
    batch: Batch,
    keys: jax.Array,
    *,
    accumulation: int,
    unroll: bool,
) -> tuple[Any, Figures]:
    """Like `gradient_of`, computed in sequential parts to need less memory."""
    if accumulation == 1:
        return gradient_of(loss, params, frozen, batch, keys)
    parts = jax.tree.map(
        lambda each: each.reshape(accumulation, -1, *each.shape[1:]), (dict(batch), keys)
    )

    def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, Figures]:
        gradient, figures = gradient_of(loss, params, frozen, *part)
        return jax.tree.map(jnp.add, total, gradient), figures

    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    total, figures = jax.lax.scan(add, zero, parts, unroll=unroll)
    mean = jax.tree.map(lambda leaf: leaf / accumulation, total)
    return mean, jax.tree.map(jnp.mean, figures)


def updated(
    state: TrainState,
    gradient: Any,
    optimizer: optax.GradientTransformation,
    *,
    finite: jax.Array,
    ema_decay: float,
) -> TrainState:
    """Return the state after an update with this gradient, or after a skipped one if not `finite`."""
    change, new_optimizer = optimizer.update(gradient, state.optimizer, state.params)
    params, optimizer_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (optax.apply_updates(state.params, change), new_optimizer),
        (state.params, state.optimizer),
    )
    # The decay grows with the number of updates, so that short runs forget their initial weights.
    warm_decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
    decay = jnp.where(finite, warm_decay, 1.0)
    return TrainState(
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
