"""Samples from a trained stage, by what its checkpoint says of itself."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from guided_distill import draws, kinds
from guided_distill.diffusion import samplers
from guided_distill.diffusion.guidance import Condition, with_clipping, with_guidance
from guided_distill.diffusion.process import Prediction
from guided_distill.diffusion.samplers import Known
from guided_distill.diffusion.schedules import CHAINS, NUM_TIMESTEPS
from guided_distill.errors import UserError
from guided_distill.files import warn_once
from guided_distill.models.registry import Network, Params
from guided_distill.training.mesh import data_mesh, replicated, split_batch
from guided_distill.training.processes import on_all_processes, to_host
from guided_distill.training.trained import Description, Trained

CompiledSampler = Callable[..., jax.Array]
CompiledNoise = Callable[..., tuple[jax.Array, jax.Array]]

_recorded: list[tuple[np.ndarray, np.ndarray]] = []
"""(t [B], x [B, ...]) of each step of the call of `predictions` that holds the lock `_recording`.

Not a list of each call's own: the compiled program, which all calls share, has its address.
"""
_recording = threading.Lock()


def run_sampler(
    network: Network,
    sampler: str,
    params: Params,
    z: jax.Array,
    keys: jax.Array,
    condition: Condition,
    null: Condition | None = None,
    known: Known | None = None,
    *,
    w: jax.Array,
    num_steps: jax.Array,
    first: jax.Array,
    clipped: bool,
    record: Callable[[jax.Array, jax.Array], None] | None = None,
) -> jax.Array:
    """From z [B, ...] at t = first/num_steps to x, keeping what is `known`; with samplers.ENCODE, back.

    A network that doesn't take w [B] is guided by two calls in one batch. clipped: hold x to [-1, 1] at
    every step. record: a callback that gets t [B] and the predicted x of every step.
    """
    denoiser = network.denoiser(params, null=null)
    if not denoiser.guided:
        denoiser = with_guidance(denoiser)
    if clipped:
        denoiser = with_clipping(denoiser, network.schedule)

    def predict(z: jax.Array, t: jax.Array) -> Prediction:
        return denoiser.predict(z, t, condition, w)

    if sampler == samplers.ENCODE:
        return samplers.encode(predict, network.schedule, z, num_steps)
    kept = samplers.keeping(predict, known) if known else predict
    watched = samplers.watched(kept, record) if record else kept
    return samplers.SAMPLERS[sampler](watched, network.schedule, z, keys, num_steps, first)


@functools.cache
def compiled_sampler(
    network: Network,
    sampler: str,
    mesh: Mesh,
    *,
    clipped: bool,
    record: Callable[[jax.Array, jax.Array], None] | None = None,
) -> CompiledSampler:
    """f(params, z, keys, condition, null, known, w, num_steps, first) -> [B, ...], as `run_sampler`.

    One compilation serves every num_steps, and all students of one network.
    """

    def run(*arrays: Any) -> jax.Array:
        *others, w, num_steps, first = arrays
        return run_sampler(
            network,
            sampler,
            *others,
            w=w,
            num_steps=num_steps,
            first=first,
            clipped=clipped,
            record=record,
        )

    whole, split = replicated(mesh), split_batch(mesh)
    return jax.jit(
        run,
        in_shardings=(whole, split, split, split, whole, split, split, whole, whole),
        out_shardings=split,
    )


@functools.cache
def compiled_noise(data_shape: tuple[int, ...], mesh: Mesh) -> CompiledNoise:
    """f(key, indices [B]) -> (unit noise [B, *data_shape], the steps' keys [B]), each from its index."""

    def draw(key: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        return samplers.initial_noise(key, indices, data_shape), samplers.step_keys(key, indices)

    split = split_batch(mesh)
    return jax.jit(draw, in_shardings=(replicated(mesh), split), out_shardings=(split, split))


def initial_noise(about: Description, count: int, *, seed: int) -> np.ndarray:
    """The z at t = 1 [count, *data_shape] that `sample` starts from with this seed."""
    mesh = data_mesh()
    indices = np.arange(-(-count // mesh.size) * mesh.size)
    indices = on_all_processes(indices, split_batch(mesh))
    return to_host(compiled_noise(about.data_shape, mesh)(draws.key_of(seed), indices)[0])[:count]


def sample(trained: Trained, **request: Any) -> np.ndarray:
    """All that `sample_batches` yields for the same arguments, in one array [n, *data_shape]."""
    return np.concatenate(list(sample_batches(trained, **request)))


def sample_batches(
    trained: Trained,
    *,
    condition: Condition,
    w: float,
    null: Condition | None = None,
    noise: np.ndarray | None = None,
    first: int | None = None,
    known: Known | None = None,
    num_steps: int | None = None,
    sampler: str | None = None,
    seed: int = 0,
    batch_size: int = 256,
    start: int = 0,
    allow_untrained: bool = False,
) -> Iterator[np.ndarray]:
    """Yields one sample for each example of `condition` [n, ...] from the index `start` on.

    Arrays are float32 [batch_size, *data_shape] and the last one less, images in [-1, 1]. A batch is no
    larger than what all devices need for n.

    null: the condition that stands for none, where a teacher needs another than that of labels.
    num_steps and sampler come from the checkpoint unless given. noise: where to start, z at t = 1
    [n, *data_shape], such as `encode` returns; drawn unless given. first: start at t = first/num_steps
    instead, where `noise` is the noisy z. known: what to keep, arrays [n, ...]. Images are held to
    [-1, 1] at every step from drawn noise, but only at the end from given noise, for clipping on the way
    doesn't undo an encoding. Sample i depends on (seed, i), its condition, its noise and w; n and
    batch_size shape the compiled program, which shows in the last digits at most. Raises UserError for
    what the checkpoint wasn't trained for, unless allow_untrained.
    """
    num_steps, sampler = check_request(
        trained.description,
        condition=condition,
        w=w,
        num_steps=num_steps,
        sampler=sampler,
        allow_untrained=allow_untrained,
    )
    of_images = trained.description.network().of_images
    batches = _run(
        trained,
        sampler,
        noise,
        condition=condition,
        null=null,
        known=known,
        w=w,
        num_steps=num_steps,
        first=first,
        seed=seed,
        batch_size=batch_size,
        start=start,
        clipped=of_images and noise is None,
    )
    for samples in batches:
        yield np.clip(samples, -1.0, 1.0) if of_images else samples


def predictions(
    trained: Trained,
    *,
    condition: Condition,
    w: float,
    null: Condition | None = None,
    num_steps: int | None = None,
    sampler: str | None = None,
    seed: int = 0,
    allow_untrained: bool = False,
) -> np.ndarray:
    """The x that every step predicts on the way of `sample`, [num_steps, n, *data_shape].

    The first is predicted at t = 1, and the last is the sample. For a few examples: they are one batch,
    on one device. The program is another than that of `sample`, which has no callback.
    Raises UserError as `sample_batches`.
    """
    num_steps, sampler = check_request(
        trained.description,
        condition=condition,
        w=w,
        num_steps=num_steps,
        sampler=sampler,
        allow_untrained=allow_untrained,
    )
    mesh = data_mesh(jax.local_devices()[:1])
    here = jax.device_put(jax.tree.map(to_host, trained.params), replicated(mesh))
    with _recording:
        _recorded.clear()
        for _ in _run(
            dataclasses.replace(trained, params=here),
            sampler,
            None,
            condition=condition,
            null=null,
            known=None,
            w=w,
            num_steps=num_steps,
            first=None,
            seed=seed,
            batch_size=_count(condition),
            start=0,
            clipped=trained.description.network().of_images,
            mesh=mesh,
            record=_record,
        ):
            jax.effects_barrier()
        steps = sorted(_recorded, key=lambda step: -step[0][0])
    return np.stack([x for _, x in steps])


def _record(t: jax.Array, x: jax.Array) -> None:
    _recorded.append((np.asarray(t), np.asarray(x)))


def encode(
    trained: Trained,
    images: np.ndarray,
    *,
    condition: Condition,
    w: float,
    null: Condition | None = None,
    num_steps: int | None = None,
    batch_size: int = 256,
) -> np.ndarray:
    """The noise z at t = 1 that `images` [n, *data_shape] come from, each under its condition.

    By an encoder student at its own N, or by the teacher or the guidance stage at any N, which is plain
    DDIM inversion. x is never clipped: at t = 0 it is z itself, and eps would be the rest, divided by
    sigma_0. The network is called at t = 0, where eps = (x - alpha_0 x_hat) / sigma_0 with
    sigma_0 = 4.5e-5: one that predicts x would give eps by float32's last digits there, and its own
    errors would count 22,000-fold. Raises UserError for such a network, for a decoder student, and for
    what the checkpoint wasn't trained for.
    """
    num_steps = check_encoding(trained.description, condition=condition, w=w, num_steps=num_steps)
    batches = _run(
        trained,
        samplers.ENCODE,
        images,
        condition=condition,
        null=null,
        known=None,
        w=w,
        num_steps=num_steps,
        first=None,
        seed=0,
        batch_size=batch_size,
        start=0,
        clipped=False,
    )
    return np.concatenate(list(batches))


def _run(
    trained: Trained,
    sampler: str,
    z: np.ndarray | None,
    *,
    condition: Condition,
    null: Condition | None,
    known: Known | None,
    w: float,
    num_steps: int,
    first: int | None,
    seed: int,
    batch_size: int,
    start: int,
    clipped: bool,
    mesh: Mesh | None = None,
    record: Callable[[jax.Array, jax.Array], None] | None = None,
) -> Iterator[np.ndarray]:
    """The compiled sampler from z [n, ...], or from drawn noise, in batches of the same size."""
    kinds.check("--seed", seed, kinds.Seed)
    network, mesh = trained.description.network(), mesh or data_mesh()
    count = _count(condition)
    batch_size = -(-min(batch_size, count) // mesh.size) * mesh.size
    run = compiled_sampler(network, sampler, mesh, clipped=clipped, record=record)
    draw, split = compiled_noise(network.data_shape, mesh), split_batch(mesh)
    for begin in range(start, count, batch_size):
        indices = np.arange(begin, begin + batch_size)
        rows = indices % count
        noise, keys = draw(draws.key_of(seed), on_all_processes(indices, split))
        given, conditions, kept, weights = on_all_processes(
            (
                None if z is None else np.asarray(z[rows], np.float32),
                {name: np.asarray(each)[rows] for name, each in condition.items()},
                None if known is None else Known(*(np.asarray(each)[rows] for each in known)),
                np.full(batch_size, w, np.float32),
            ),
            split,
        )
        batch = run(
            trained.params,
            noise if z is None else given,
            keys,
            conditions,
            network.null if null is None else null,
            kept,
            weights,
            np.int32(num_steps),
            np.int32(num_steps if first is None else first),
        )
        yield to_host(batch)[: count - begin]


def check_request(
    about: Description,
    *,
    condition: Condition,
    w: float,
    num_steps: int | None,
    sampler: str | None,
    allow_untrained: bool,
) -> tuple[int, str]:
    """The number of steps and the sampler to use. Raises UserError, saying what was trained."""
    if about.sampler == samplers.ENCODE:
        raise UserError(
            "this student was trained to encode images, not to sample: choose a stage of another "
            "sampler, such as halving_ddim_4"
        )
    num_steps, sampler = given_or_trained(about, num_steps=num_steps, sampler=sampler)
    _check_condition(about, condition)
    kinds.check("--w", w, kinds.Weight)
    if allow_untrained:
        return num_steps, sampler
    _check_w(about, w, flag="--w", way_out=", or add --allow_untrained")
    if about.num_steps is not None and (num_steps, sampler) != (about.num_steps, about.sampler):
        raise UserError(
            f"this student was trained for {about.num_steps} steps of the {about.sampler} sampler, not "
            f"{num_steps} of {sampler}: leave --num_steps and --sampler out, or add --allow_untrained"
        )
    if about.num_steps is None and sampler == "stochastic":
        raise UserError(
            "--sampler stochastic needs a student that was trained for it: set "
            "config.halving.samplers to ('stochastic',) and train one"
        )
    return num_steps, sampler


def given_or_trained(
    about: Description, *, num_steps: int | None, sampler: str | None
) -> tuple[int, str]:
    """The number of steps and the sampler, those that were trained where none is given.

    Raises UserError for what no sampler could do.
    """
    sampler = sampler or about.sampler or "ddim"
    if sampler not in samplers.SAMPLERS:
        raise UserError(f"--sampler is {sampler!r}; choose one of {', '.join(samplers.SAMPLERS)}")
    return _steps_or_trained(about, num_steps), sampler


def check_encoding(
    about: Description, *, condition: Condition, w: float, num_steps: int | None
) -> int:
    """The number of steps to encode in. Raises UserError, saying what was trained."""
    if about.sampler not in (None, samplers.ENCODE):
        raise UserError(
            f"this student was trained to sample ({about.sampler}), not to encode: choose one of "
            f"config.halving.samplers=('encode',), such as halving_encode_4, or the guidance stage"
        )
    if about.model.parameterization == "x":
        raise UserError(
            "this network predicts x, which doesn't give eps at t = 0, where encoding begins: choose a "
            "run of config.model.parameterization v or eps"
        )
    num_steps = _steps_or_trained(about, num_steps)
    _check_condition(about, condition)
    kinds.check("--w_encode", w, kinds.Weight)
    _check_w(about, w, flag="--w_encode")
    if about.num_steps not in (None, num_steps):
        raise UserError(
            f"this student was trained to encode in {about.num_steps} steps, not in {num_steps}: leave "
            f"num_steps out"
        )
    return num_steps


def _steps_or_trained(about: Description, num_steps: int | None) -> int:
    if num_steps is None:
        return about.num_steps or 2 * about.experiment.halving.first_num_steps
    kinds.check("--num_steps", num_steps, kinds.NumSteps)
    if about.model.schedule in CHAINS and num_steps > NUM_TIMESTEPS:
        raise UserError(
            f"--num_steps is {num_steps}, but this model's schedule, {about.model.schedule}, is a chain "
            f"of {NUM_TIMESTEPS} noise levels: give {NUM_TIMESTEPS} or less"
        )
    return num_steps


def _count(condition: Condition) -> int:
    return len(np.asarray(next(iter(condition.values()))))


def _check_condition(about: Description, condition: Condition) -> None:
    for name, shape in about.condition_shapes.items():
        if name not in condition or np.shape(condition[name])[1:] != shape:
            raise ValueError(f"{name} must be [n, {', '.join(map(str, shape))}]")
    if "label" not in condition:
        return
    labels, num_classes = np.asarray(condition["label"]), len(about.class_names)
    if len(labels) == 0 or np.min(labels) < 0 or np.max(labels) >= num_classes:
        raise UserError(
            f"--labels must name classes in 0 ... {num_classes - 1}, at least one of them"
        )


def usual_w(about: Description, wished: float = 1.0) -> float:
    """The guidance weight to use where none is given: the trained one that is nearest to `wished`."""
    if about.w_min is None or about.w_max is None:
        return wished
    return min(max(wished, about.w_min), about.w_max)


def _check_w(about: Description, w: float, *, flag: str, way_out: str = "") -> None:
    if about.w_min is not None and about.w_max is not None and not about.w_min <= w <= about.w_max:
        raise UserError(
            f"{flag} is {w}, outside the range [{about.w_min}, {about.w_max}] that this {about.stage} "
            f"student was trained on: choose a w in it{way_out}"
        )


def of_labels(labels: Sequence[int] | np.ndarray) -> Condition:
    """The condition of classes [n]."""
    return {"label": np.asarray(labels, np.int32)}


def class_index(label: int | str, about: Description, *, flag: str) -> int:
    """The place of a class that a user names: a number is the place itself, a string is a name.

    Names of folders are sorted as text, so the place of the class "2" may be another than 2, of which a
    warning says. Raises UserError, naming the flag, if there is no such class.
    """
    names = about.class_names
    if isinstance(label, str):
        place = names.index(label) if label in names else -1
    else:
        place = int(label) if isinstance(label, int | np.integer) else -1
        if str(place) in names and names.index(str(place)) != place < len(names):
            warn_once(
                f"{flag}: class {place} is the one named {names[place]!r}, and the one named '{place}' "
                f"is class {names.index(str(place))}"
            )
    if not 0 <= place < len(names):
        raise UserError(
            f"{flag} is {label!r}; give a number in 0 ... {len(names) - 1}, or one of "
            f"{', '.join(names[:10])}{' ...' if len(names) > 10 else ''}"
        )
    return place


def cycling_labels(count: int, num_classes: int) -> np.ndarray:
    """Labels [count] that go through the classes in turn."""
    return np.arange(count, dtype=np.int32) % num_classes
