"""The programs of a run, compiled for a mesh whose devices need not be there."""

import contextlib
import hashlib
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from guided_distill.config import Experiment
from guided_distill.data.outline import Outline
from guided_distill.models.registry import Network
from guided_distill.stages import Stage, compiled_step
from guided_distill.training.checkpoints import abstract
from guided_distill.training.mesh import replicated, split_batch
from guided_distill.training.state import initial_state
from guided_distill.training.trained import network_of


class Collective(NamedTuple):
    """What one kind of communication moves in a program: how often, and bytes of results a device."""

    times: int
    bytes: int


class Measured(NamedTuple):
    """What the compiler says of a program, by device.

    flops, bytes: of one run, as it counts them. seconds: its own estimate, None where it makes none.
    arguments, temporary, peak: bytes of memory. collectives: by kind.
    """

    flops: float
    bytes: float
    seconds: float | None
    arguments: int
    temporary: int
    peak: int
    collectives: dict[str, Collective]


def student_of(experiment: Experiment, outline: Outline) -> Network:
    """The network of stage one and of the halving rounds."""
    return _teacher_of(experiment, outline).told_w(experiment.guidance.w_embedding)


def networks_of(experiment: Experiment, outline: Outline, stage: Stage) -> tuple[Network, Network]:
    """The network that a stage trains, and its teacher's."""
    plain, told_w = _teacher_of(experiment, outline), student_of(experiment, outline)
    taught_by_student = stage.kind == "halving" and experiment.method == "guided"
    return told_w if stage.takes_w else plain, told_w if taught_by_student else plain


def _teacher_of(experiment: Experiment, outline: Outline) -> Network:
    return network_of(
        experiment.model,
        outline.shape,
        num_classes=outline.num_classes,
        condition_shapes=outline.condition_shapes,
        latent=outline.latent,
    )


def parameter_count(network: Network) -> int:
    """By shapes alone."""
    return sum(leaf.size for leaf in jax.tree.leaves(_weights_of(network)))


def kept_bytes(network: Network) -> int:
    """Bytes that the backward pass needs of one example, besides the weights; by shapes alone."""
    weights = _weights_of(network)
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    z = jax.ShapeDtypeStruct((1, *network.data_shape), jnp.float32)
    condition = {
        name: jax.ShapeDtypeStruct((1, *shape), jnp.int32 if name == "label" else jnp.float32)
        for name, shape in network.condition_shapes
    }

    def backward(params: Any, z: jax.Array, t: jax.Array, condition: Any, w: jax.Array) -> Any:
        def output(params: Any) -> jax.Array:
            told = w if network.w_conditioned else None
            return network.denoiser(params).predict(z, t, condition, told).x

        return jax.vjp(output, params)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, weights, z, one, condition, one))
    # Weights are kept too, as they are or in another precision.
    of_weights = {leaf.shape for leaf in jax.tree.leaves(weights)}
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept if leaf.shape not in of_weights)


def _weights_of(network: Network) -> Any:
    return jax.eval_shape(network.init, jax.random.key(0))


def lower_step(
    experiment: Experiment, outline: Outline, stage: Stage, mesh: Mesh
) -> jax.stages.Lowered:
    """The very step that `train` runs for a stage: one update, traced without an array."""
    student, teacher = networks_of(experiment, outline, stage)
    step, optimizer = compiled_step(
        stage.kind,
        stage.settings,
        student=student,
        teacher=teacher,
        mesh=mesh,
        total_steps=stage.total_steps,
        sampler=stage.sampler,
        w_range=(experiment.guidance.w_min, experiment.guidance.w_max),
    )
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
    batch = jax.tree.map(
        lambda one: jax.ShapeDtypeStruct((1, stage.settings.batch_size, *one.shape), one.dtype),
        outline.example,
    )
    return step.lower(  # type: ignore[attr-defined]
        abstract(state, mesh), abstract(frozen, mesh), batch, key
    )


def lower_call(
    network: Network, outline: Outline, mesh: Mesh, *, batch_size: int
) -> jax.stages.Lowered:
    """One call of a student on a batch: what each of N steps of its sampler costs."""
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


def fingerprint(lowered: jax.stages.Lowered) -> str:
    """The same for the same program."""
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]


def compile_and_measure(lowered: jax.stages.Lowered, *, level: str) -> Measured:
    """Compile at an optimization level, and read what the compiler says.

    Raises MemoryError if the program doesn't fit into a device's memory.
    """
    with _optimization(level):
        try:
            compiled = lowered.compile()
        except Exception as error:  # jaxlib's own error, told by its words alone.
            if "RESOURCE_EXHAUSTED" in str(error):
                raise MemoryError(str(error).splitlines()[0]) from error
            raise
    cost: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    program: Any = compiled.as_text()
    seconds = cost.get("optimal_seconds", 0.0)
    return Measured(
        flops=cost["flops"],
        bytes=cost["bytes accessed"],
        seconds=seconds if seconds > 0 else None,
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        collectives=collectives_of(program),
    )


@contextlib.contextmanager
def _optimization(level: str) -> Iterator[None]:
    before = jax.config.jax_optimization_level  # type: ignore[attr-defined]
    jax.config.update("jax_optimization_level", level)
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)


_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


def collectives_of(program: str) -> dict[str, Collective]:
    """The collectives of a compiled program's text, by kind, those that occur.

    A started one counts where it is done, so that its operands aren't taken for results.
    """
    found: dict[str, Collective] = {}
    for line in program.splitlines():
        match = re.match(rf"\s*(?:ROOT )?%?\S+ = (.*?) ({'|'.join(_KINDS)})(-start|-done)?\(", line)
        if match is None or match[3] == "-start":
            continue
        times, size = found.get(match[2], Collective(0, 0))
        found[match[2]] = Collective(times + 1, size + _bytes_of(match[1]))
    return found


def _bytes_of(shapes: str) -> int:
    return sum(
        math.prod(int(length) for length in lengths.split(",") if length) * _width(kind)
        for kind, lengths in _ARRAY.findall(shapes)
    )


def _width(kind: str) -> int:
    """Bytes of an element: f32, bf16, s8, pred ..."""
    bits = re.search(r"\d+", kind)
    return max(1, int(bits[0]) // 8) if bits else 1
