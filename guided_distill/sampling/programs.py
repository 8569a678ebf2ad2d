"""The compiled programs: from noise to samples and back, and for drawing noise."""

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


class Inputs(NamedTuple):
    """A batch for a sampler: z [B, ...] at t = first/num_steps, keys [B], and conditions.

    null: the null condition of one example; None if the network has its own, or needs none. known: what
    in-painting keeps. w: [B]. num_steps, first: numbers, traced or not.
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
    network: Network, sampler: str, params: Params, inputs: Inputs, *, clipped: bool
) -> jax.Array:
    """Run a sampler from z to x, which keeps what is known; or, for samplers.ENCODE, from x to z.

    clipped: clip x to [-1, 1] at every step.
    """
    predict = _predict(network, params, inputs, clipped=clipped)
    z, num_steps = inputs.z, inputs.num_steps
    if sampler == samplers.ENCODE:
        return samplers.encode(predict, network.schedule, z, num_steps)
    return samplers.SAMPLERS[sampler](
        predict, network.schedule, z, inputs.keys, num_steps, inputs.first
    )


def _predict(
    network: Network, params: Params, inputs: Inputs, *, clipped: bool
) -> samplers.Predict:
    """The guided prediction; a network that doesn't take w computes both branches in one batch."""
    denoiser = network.denoiser(params, null=inputs.null)
    if not denoiser.guided:
        denoiser = with_guidance(denoiser)
    if clipped:
        denoiser = with_clipping(denoiser, network.schedule)

    def predict(z: jax.Array, t: jax.Array) -> Prediction:
        return denoiser.predict(z, t, inputs.condition, inputs.w)

    return samplers.keeping(predict, inputs.known) if inputs.known else predict


@functools.cache
def compiled_sampler(
    network: Network, sampler: str, mesh: Mesh, *, clipped: bool
) -> Callable[[Params, Inputs], jax.Array]:
    """`run_sampler` for a network on a mesh.

    One compilation serves every num_steps, and all students with the same network.
    """

    def run(params: Params, inputs: Inputs) -> jax.Array:
        return run_sampler(network, sampler, params, inputs, clipped=clipped)

    whole, split = replicated(mesh), split_batch(mesh)
    places = Inputs._make([split, split, split, whole, split, split, whole, whole])
    return jax.jit(run, in_shardings=(whole, places), out_shardings=split)


@functools.cache
def compiled_predictions(
    network: Network, sampler: str, *, clipped: bool, room: int
) -> Callable[[Params, Inputs], jax.Array]:
    """f(params, inputs) -> the x [room, B, ...] that each step predicts; see `Sampler.predictions`.

    One compilation serves every num_steps up to `room`.
    """

    def run(params: Params, inputs: Inputs) -> jax.Array:
        predict = _predict(network, params, inputs, clipped=clipped)
        return samplers.SAMPLERS[sampler].predictions(
            predict, network.schedule, inputs.z, inputs.keys, inputs.num_steps, room=room
        )

    return jax.jit(run)


@functools.cache
def compiled_noise(
    data_shape: tuple[int, ...], mesh: Mesh
) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """f(key, indices [B]) -> (unit noise [B, *data_shape], keys [B] of the steps), one for each index."""

    def draw(key: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        return samplers.initial_noise(key, indices, data_shape), samplers.step_keys(key, indices)

    split = split_batch(mesh)
    return jax.jit(draw, in_shardings=(replicated(mesh), split), out_shardings=(split, split))
