"""The compiled programs: from noise to samples and back, and what draws the noise."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from guided_distill.diffusion import samplers
from guided_distill.diffusion.guidance import Condition, with_clipping, with_guidance
from guided_distill.diffusion.process import Prediction
from guided_distill.diffusion.samplers import Known
from guided_distill.models.registry import Network, Params
from guided_distill.training.mesh import replicated, split_batch

Record = Callable[[jax.Array, jax.Array], None]
"""A callback that gets t [B] and the predicted x [B, ...] of every step."""


class Inputs(NamedTuple):
    """A batch for a sampler: z [B, ...] at t = first/num_steps, keys [B], and conditions.

    null: the condition that stands for none, one example's; None where the network knows it, or needs
    none. known: what to keep. w: [B]. num_steps, first: numbers, traced or not.
    """

    z: jax.Array
    keys: jax.Array
    condition: Condition
    null: Condition | None
    known: Known | None
    w: jax.Array
    num_steps: Any
    first: Any


def run_sampler(
    network: Network,
    sampler: str,
    params: Params,
    inputs: Inputs,
    *,
    clipped: bool,
    record: Record | None = None,
) -> jax.Array:
    """From z to x, keeping what is known; with samplers.ENCODE, from x to z.

    A network that doesn't take w is guided by two calls in one batch. clipped: hold x to [-1, 1] at
    every step. record: called back from the device; see `samplers.watched`.
    """
    z, keys, condition, null, known, w, num_steps, first = inputs
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
    network: Network, sampler: str, mesh: Mesh, *, clipped: bool, record: Record | None = None
) -> Callable[[Params, Inputs], jax.Array]:
    """`run_sampler` for a network on a mesh.

    One compilation serves every num_steps, and all students of one network.
    """

    def run(params: Params, inputs: Inputs) -> jax.Array:
        return run_sampler(network, sampler, params, inputs, clipped=clipped, record=record)

    whole, split = replicated(mesh), split_batch(mesh)
    places = Inputs._make([split, split, split, whole, split, split, whole, whole])
    return jax.jit(run, in_shardings=(whole, places), out_shardings=split)


@functools.cache
def compiled_noise(
    data_shape: tuple[int, ...], mesh: Mesh
) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """f(key, indices [B]) -> (unit noise [B, *data_shape], the steps' keys [B]), each from its index."""

    def draw(key: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        return samplers.initial_noise(key, indices, data_shape), samplers.step_keys(key, indices)

    split = split_batch(mesh)
    return jax.jit(draw, in_shardings=(replicated(mesh), split), out_shardings=(split, split))
