"""Samples from a trained stage, by what its checkpoint says of itself."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from guided_distill.diffusion import samplers
from guided_distill.diffusion.guidance import with_clipping, with_guidance
from guided_distill.diffusion.process import Prediction
from guided_distill.errors import UserError
from guided_distill.models.registry import Network, Params
from guided_distill.training.mesh import data_mesh, replicated, split_batch
from guided_distill.training.trained import Description, Trained

CompiledSampler = Callable[..., jax.Array]


@functools.cache
def compiled_sampler(network: Network, sampler: str, mesh: Mesh) -> CompiledSampler:
    """f(params, key, indices [B], label [B], w [B], num_steps) -> x [B, ...].

    One compilation serves every num_steps, and all students of one network. A network that doesn't
    take w is guided by two calls in one batch. Images are held to [-1, 1] at every step. Sample i draws
    from fold_in(key, indices[i]) alone.
    """

    def sample(
        params: Params,
        key: jax.Array,
        indices: jax.Array,
        label: jax.Array,
        w: jax.Array,
        num_steps: jax.Array,
    ) -> jax.Array:
        denoiser = network.denoiser(params)
        if not denoiser.guided:
            denoiser = with_guidance(denoiser)
        if network.of_images:
            denoiser = with_clipping(denoiser, network.schedule)

        def predict(z: jax.Array, t: jax.Array) -> Prediction:
            return denoiser.predict(z, t, label, w)

        keys = samplers.sample_keys(key, indices)
        noise = samplers.normal(keys, network.data_shape)
        return samplers.SAMPLERS[sampler](predict, network.schedule, noise, keys, num_steps)

    whole, split = replicated(mesh), split_batch(mesh)
    return jax.jit(
        sample, in_shardings=(whole, whole, split, split, split, whole), out_shardings=split
    )


def sample(
    trained: Trained,
    *,
    labels: np.ndarray,
    w: float,
    num_steps: int | None = None,
    sampler: str | None = None,
    seed: int = 0,
    batch_size: int = 256,
    allow_untrained: bool = False,
) -> np.ndarray:
    """One sample for each of `labels` [n]: float32 [n, *data_shape], images in [-1, 1].

    All of `sample_batches` in one array.
    """
    batches = sample_batches(
        trained,
        labels=labels,
        w=w,
        num_steps=num_steps,
        sampler=sampler,
        seed=seed,
        batch_size=batch_size,
        allow_untrained=allow_untrained,
    )
    return np.concatenate(list(batches))


def sample_batches(
    trained: Trained,
    *,
    labels: np.ndarray,
    w: float,
    num_steps: int | None = None,
    sampler: str | None = None,
    seed: int = 0,
    batch_size: int = 256,
    start: int = 0,
    allow_untrained: bool = False,
) -> Iterator[np.ndarray]:
    """Yields one sample for each of `labels` [n] from the index `start` on, batch_size at a time.

    Arrays are float32 [b, *data_shape], images in [-1, 1].

    num_steps and sampler come from the checkpoint unless given. Sample i depends on (seed, i), its
    label and w, and not on batch_size, which only bounds the memory. Raises UserError for what the
    checkpoint wasn't trained for, unless allow_untrained.
    """
    num_steps, sampler = check_request(
        trained.description,
        labels=labels,
        w=w,
        num_steps=num_steps,
        sampler=sampler,
        allow_untrained=allow_untrained,
    )
    mesh = data_mesh()
    batch_size = -(-batch_size // mesh.size) * mesh.size
    run = compiled_sampler(trained.description.network(), sampler, mesh)
    count = len(labels)
    padded = count + batch_size
    indices = np.arange(padded)
    labels = np.resize(labels, padded).astype(np.int32)
    for first in range(start, count, batch_size):
        batch = slice(first, first + batch_size)
        samples = run(
            trained.params,
            jax.random.key(seed),
            indices[batch],
            labels[batch],
            np.full(batch_size, w, np.float32),
            jnp.asarray(num_steps, jnp.int32),
        )
        yield np.asarray(samples)[: count - first]


def check_request(
    about: Description,
    *,
    labels: np.ndarray,
    w: float,
    num_steps: int | None,
    sampler: str | None,
    allow_untrained: bool,
) -> tuple[int, str]:
    """The number of steps and the sampler to use. Raises UserError, saying what was trained."""
    trained_sampler = about.sampler or "ddim"
    trained_steps = about.num_steps or 2 * about.experiment.halving.first_num_steps
    num_steps = trained_steps if num_steps is None else num_steps
    sampler = sampler or trained_sampler
    num_classes = len(about.class_names)
    if sampler not in samplers.SAMPLERS:
        raise UserError(f"--sampler is {sampler!r}; choose one of {', '.join(samplers.SAMPLERS)}")
    if num_steps < 1:
        raise UserError(f"--num_steps is {num_steps}; sampling takes at least 1 step")
    if len(labels) == 0 or np.min(labels) < 0 or np.max(labels) >= num_classes:
        raise UserError(
            f"--labels must name classes in 0 ... {num_classes - 1}, at least one of them"
        )
    if allow_untrained:
        return num_steps, sampler
    if about.w_min is not None and about.w_max is not None and not about.w_min <= w <= about.w_max:
        raise UserError(
            f"--w is {w}, outside the range [{about.w_min}, {about.w_max}] that this {about.stage} "
            f"student was trained on: choose a w in it, or add --allow_untrained"
        )
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


def cycling_labels(count: int, num_classes: int) -> np.ndarray:
    """Labels [count] that go through the classes in turn."""
    return np.arange(count, dtype=np.int32) % num_classes
