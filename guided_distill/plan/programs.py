"""The programs of a run, traced for a mesh whose devices needn't be attached."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from guided_distill.config import Experiment
from guided_distill.models.outline import Outline
from guided_distill.models.registry import Network
from guided_distill.objectives.stage import Batch, Stage
from guided_distill.objectives.weighting import Loss
from guided_distill.runs.trained import network_of
from guided_distill.stages import compiled_step, teacher_of
from guided_distill.training.checkpoints import abstract
from guided_distill.training.mesh import replicated, split_batch
from guided_distill.training.state import initial_state, make_optimizer
from guided_distill.training.step import TrainStep, make_train_step


def student_of(experiment: Experiment, outline: Outline) -> Network:
    """Return the network of stage one and of the halving rounds."""
    return _teacher_of(experiment, outline).conditioned_on_w(experiment.guidance.w_embedding)


def networks_of(experiment: Experiment, outline: Outline, stage: Stage) -> tuple[Network, Network]:
    """Return the network that a stage trains, and its teacher's network."""
    plain, student = _teacher_of(experiment, outline), student_of(experiment, outline)
    teacher = teacher_of(experiment, stage)
    return (
        student if stage.takes_w else plain,
        student if teacher is not None and teacher.takes_w else plain,
    )


def _teacher_of(experiment: Experiment, outline: Outline) -> Network:
    return network_of(experiment.model, outline)


def parameter_count(network: Network) -> int:
    """Return the number of weights, from shapes alone."""
    return sum(leaf.size for leaf in jax.tree.leaves(_weights_of(network)))


def kept_bytes(network: Network) -> int:
    """Return the bytes per example that the backward pass keeps besides the weights, by shapes alone."""
    weights = _weights_of(network)
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    z = jax.ShapeDtypeStruct((1, *network.data_shape), jnp.float32)
    condition = {
        name: jax.ShapeDtypeStruct((1, *shape), jnp.int32 if name == "label" else jnp.float32)
        for name, shape in network.condition_shapes
    }

    def backward(params: Any, z: jax.Array, t: jax.Array, condition: Any, w: jax.Array) -> Any:
        def output(params: Any) -> jax.Array:
            weight = w if network.w_conditioned else None
            return network.denoiser(params).predict(z, t, condition, weight).x

        return jax.vjp(output, params)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, weights, z, one, condition, one))
    # The backward pass also keeps weights, possibly in another precision.
    of_weights = {leaf.shape for leaf in jax.tree.leaves(weights)}
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept if leaf.shape not in of_weights)


def _weights_of(network: Network) -> Any:
    return jax.eval_shape(network.init, jax.random.key(0))


def lower_step(
    experiment: Experiment, outline: Outline, stage: Stage, mesh: Mesh
) -> jax.stages.Lowered:
    """Lower the step that `train` runs for a stage: one update, traced without arrays."""
    student, teacher = networks_of(experiment, outline, stage)
    step, optimizer = compiled_step(stage, student=student, teacher=teacher, mesh=mesh)
    held = _held(optimizer, outline, stage, student=student, teacher=teacher, mesh=mesh)
    return _lowered(step, held, outline, stage)


def lower_rest_of_step(
    experiment: Experiment, outline: Outline, stage: Stage, mesh: Mesh
) -> jax.stages.Lowered:
    """Lower an update without its gradient: the same step with a loss of almost no work."""
    student, teacher = networks_of(experiment, outline, stage)
    optimizer = make_optimizer(stage.settings, steps=stage.total_steps)

    def no_work(params: Any, frozen: Any, batch: Batch, keys: jax.Array) -> Loss:
        total = sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(params))
        return Loss(jnp.broadcast_to(total, batch["image"].shape[:1]), {})

    step = make_train_step(
        no_work,
        optimizer,
        ema_decay=stage.settings.ema_decay,
        mesh=mesh,
        rounded=student.rounded,
    )
    held = _held(optimizer, outline, stage, student=student, teacher=teacher, mesh=mesh)
    return _lowered(step, held, outline, stage)


def _lowered(
    step: TrainStep, held: tuple[Any, Any], outline: Outline, stage: Stage
) -> jax.stages.Lowered:
    batch = jax.tree.map(
        lambda one: jax.ShapeDtypeStruct((1, stage.settings.batch_size, *one.shape), one.dtype),
        outline.example,
    )
    return step.lower(*held, batch, jax.eval_shape(jax.random.key, 0))


def _held(
    optimizer: optax.GradientTransformation,
    outline: Outline,
    stage: Stage,
    *,
    student: Network,
    teacher: Network,
    mesh: Mesh,
) -> tuple[Any, Any]:
    """Return the shapes of a step's arguments that stay on the devices: the state, and frozen inputs."""
    key = jax.eval_shape(jax.random.key, 0)
    state = jax.eval_shape(
        lambda key: initial_state(student.init(key), optimizer, ema_decay=stage.settings.ema_decay),
        key,
    )
    frozen = {
        "params": {}
        if stage.kind == "teacher"
        else jax.eval_shape(lambda key: teacher.rounded(teacher.init(key)), key),
        "num_steps": jax.ShapeDtypeStruct((), jnp.int32),
        "null": outline.null,
    }
    return abstract(state, mesh), abstract(frozen, mesh)


def held_bytes(experiment: Experiment, outline: Outline, stage: Stage | None, mesh: Mesh) -> int:
    """Return a device's bytes for any batch size, for a stage's update, or for a call without a stage."""
    if stage is None:
        weights = _weights_of(student_of(experiment, outline))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
    student, teacher = networks_of(experiment, outline, stage)
    optimizer = make_optimizer(stage.settings, steps=stage.total_steps)
    held = _held(optimizer, outline, stage, student=student, teacher=teacher, mesh=mesh)
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(held)
    )


def lower_call(
    network: Network, outline: Outline, mesh: Mesh, *, batch_size: int
) -> jax.stages.Lowered:
    """Lower one call of a student on a batch, which each of the N steps of its sampler makes."""
    examples = {
        name: jax.ShapeDtypeStruct((batch_size, *one.shape), one.dtype)
        for name, one in outline.example.items()
    }
    number = jax.ShapeDtypeStruct((batch_size,), jnp.float32)

    def call(params: Any, examples: Any, t: jax.Array, w: jax.Array) -> jax.Array:
        condition = {name: each for name, each in examples.items() if name != "image"}
        return network.denoiser(params).predict(examples["image"], t, condition, w).x

    split = split_batch(mesh)
    run = jax.jit(call, in_shardings=(replicated(mesh), split, split, split), out_shardings=split)
    return run.lower(_weights_of(network), examples, number, number)
