"""A training in its own folder: from its newest checkpoint, or from given weights, to its end."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from etils import epath
from jax.sharding import Mesh

from guided_distill.config import Cadence
from guided_distill.data.pipeline import batches
from guided_distill.data.source import Source
from guided_distill.objectives.stage import Optimization
from guided_distill.storage import write_text
from guided_distill.training.checkpoints import StageCheckpoints, abstract
from guided_distill.training.loop import train
from guided_distill.training.metrics import MetricsLog, parameter_table
from guided_distill.training.processes import process_order
from guided_distill.training.state import TrainState, split_initial_state
from guided_distill.training.step import TrainStep


def hand_on(directory: epath.Path, params: Any, *, about: Mapping[str, Any]) -> None:
    """Keep `params` as the result of a stage without updates. Raises UserError if the disk is full."""
    with StageCheckpoints(directory) as checkpoints:
        checkpoints.save_result(0, params, about=about)


def train_in(
    directory: epath.Path,
    *,
    source: Source,
    flip: bool,
    seed: int,
    shapes: Any,
    initial: Callable[[], Any],
    step: TrainStep,
    optimizer: optax.GradientTransformation,
    settings: Optimization,
    total_steps: int,
    frozen: Any,
    key: jax.Array,
    cadence: Cadence,
    about: Mapping[str, Any],
    mesh: Mesh,
    title: str,
) -> TrainState:
    """Train on the source from a checkpoint, or from `initial()`; returns the state after total_steps.

    initial: makes the weights of these shapes at step 0, where they live on the mesh; a resumed stage
    never calls it, so that the devices hold no other state beside the restored one. seed draws the
    batches, key what the loss draws. about: what the checkpoints say of themselves.
    The folder then holds checkpoints/, metrics.jsonl, tensorboard/ and parameters.txt. Raises UserError
    if the disk is full, or the loss isn't finite for long, and Interrupted after saving if the machine
    is to be taken away.
    """
    start = functools.partial(
        split_initial_state, optimizer=optimizer, ema_decay=settings.ema_decay, mesh=mesh
    )
    iterator = batches(
        source,
        batch_size=settings.batch_size // jax.process_count(),
        seed=seed,
        flip=flip,
        process_index=process_order(mesh).index(jax.process_index()),
        process_count=jax.process_count(),
    )
    with (
        contextlib.closing(iterator),
        StageCheckpoints(
            directory, keep=cadence.checkpoints_to_keep, total_steps=total_steps
        ) as checkpoints,
    ):
        restored = checkpoints.restore(abstract(jax.eval_shape(start, shapes), mesh))
        if restored is None:
            unlogged: Sequence[float] = ()
            params = initial()
            write_text(directory / "parameters.txt", parameter_table(params))
            state = start(params)
            del params
        else:
            state, data_state, _, unlogged = restored
            del restored  # The first update takes the state's memory over.
            iterator.set_state(data_state)
        with contextlib.closing(MetricsLog(directory, step=int(state.step))) as metrics_log:
            return train(
                state,
                step,
                frozen=frozen,
                batches=iterator,
                key=key,
                total_steps=total_steps,
                cadence=cadence,
                checkpoints=checkpoints,
                about=about,
                metrics_log=metrics_log,
                unlogged=unlogged,
                mesh=mesh,
                title=title,
            )
