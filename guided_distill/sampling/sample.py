"""Sample from a trained stage, as its checkpoint's description requires, and encode images to noise."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from guided_distill import draws, kinds
from guided_distill.diffusion.samplers import Known
from guided_distill.models.registry import Network
from guided_distill.runs.trained import Description, Trained
from guided_distill.sampling.programs import (
    Inputs,
    compiled_noise,
    compiled_predictions,
    compiled_sampler,
)
from guided_distill.sampling.request import Request, check_encoding, check_request
from guided_distill.training.mesh import data_mesh, replicated, split_batch
from guided_distill.training.processes import on_all_processes, to_host

FEWEST_PREDICTIONS = 8
"""The smallest room for predictions, so that few-step students share one compilation."""


def initial_noise(about: Description, count: int, *, seed: int) -> np.ndarray:
    """The z at t = 1 [count, *data_shape] that `sample` starts from with this seed."""
    mesh = data_mesh()
    indices = np.arange(-(-count // mesh.size) * mesh.size)
    indices = on_all_processes(indices, split_batch(mesh))
    return to_host(compiled_noise(about.data_shape, mesh)(draws.key_of(seed), indices)[0])[:count]


def sample(trained: Trained, request: Request) -> np.ndarray:
    """The samples of `sample_batches` in one array [n, *data_shape]."""
    return np.concatenate(list(sample_batches(trained, request)))


def sample_batches(trained: Trained, request: Request) -> Iterator[np.ndarray]:
    """Yield the samples of a request, float32 [batch_size, *data_shape]; the last batch may be smaller.

    Images are in [-1, 1]: clipped at every step from drawn noise, but only at the end from given noise,
    because clipped steps aren't the inverse of encoding. Raises UserError as `check_request`.
    """
    request = check_request(trained.description, request)
    of_images = trained.description.network().of_images
    for samples in _run(trained, request, clipped=of_images and request.noise is None):
        yield np.clip(samples, -1.0, 1.0) if of_images else samples


def predictions(trained: Trained, request: Request) -> np.ndarray:
    """Return the x that each step of `sample` predicts, [num_steps, n, *data_shape].

    The first is predicted at t = 1, and the last is the sample. Meant for few examples, because all are
    one batch on one device, in a program of its own. Raises UserError as `check_request`, and ValueError
    for a request that starts later than t = 1.
    """
    if request.first is not None:
        raise ValueError("predictions start at t = 1: leave `first` out")
    request = check_request(trained.description, request)
    assert request.sampler is not None
    assert request.num_steps is not None
    network = trained.description.network()
    mesh = data_mesh(jax.local_devices()[:1])
    room = max(FEWEST_PREDICTIONS, 1 << (request.num_steps - 1).bit_length())
    run = compiled_predictions(network, request.sampler, clipped=network.of_images, room=room)
    params = jax.device_put(jax.tree.map(to_host, trained.params), replicated(mesh))
    inputs = _inputs(network, request, np.arange(request.start, request.count), mesh)
    return np.asarray(run(params, inputs))[: request.num_steps]


def encode(trained: Trained, images: np.ndarray, request: Request) -> np.ndarray:
    """Encode `images` [n, *data_shape] to noise z at t = 1, each under its condition and w.

    An encoder student does so in its own N steps; the teacher and stage one in any N, which is DDIM
    inversion. The network is called at t = 0, where eps = (x - alpha_0 x_hat) / sigma_0 with
    sigma_0 = 4.5e-5: eps from a network that predicts x would have only the last digits of float32, and
    its errors multiplied by 22,000. For the same reason x isn't clipped. Raises UserError for a network
    that predicts x, a decoder student, and settings that the checkpoint wasn't trained for.
    """
    request = check_encoding(trained.description, request)
    request = dataclasses.replace(request, noise=images)
    return np.concatenate(list(_run(trained, request, clipped=False)))


def _run(trained: Trained, request: Request, *, clipped: bool) -> Iterator[np.ndarray]:
    """Run the compiled sampler from request.noise [n, ...] or drawn noise, in batches of one size."""
    assert request.sampler is not None
    network, mesh, count = trained.description.network(), data_mesh(), request.count
    batch_size = -(-min(request.batch_size, count) // mesh.size) * mesh.size
    run = compiled_sampler(network, request.sampler, mesh, clipped=clipped)
    for begin in range(request.start, count, batch_size):
        inputs = _inputs(network, request, np.arange(begin, begin + batch_size), mesh)
        yield to_host(run(trained.params, inputs))[: count - begin]


def _inputs(network: Network, request: Request, indices: np.ndarray, mesh: Mesh) -> Inputs:
    """The sampler's inputs for the samples at `indices` [B], modulo n."""
    kinds.check("--seed", request.seed, kinds.Seed)
    assert request.num_steps is not None
    given, known, count = request.noise, request.known, request.count
    rows, split = indices % count, split_batch(mesh)
    draw = compiled_noise(network.data_shape, mesh)
    noise, keys = draw(draws.key_of(request.seed), on_all_processes(indices, split))
    weights = np.broadcast_to(np.asarray(request.w, np.float32), (count,))
    z, condition, kept, w = on_all_processes(
        (
            None if given is None else np.asarray(given[rows], np.float32),
            {name: np.asarray(each)[rows] for name, each in request.condition.items()},
            None if known is None else Known(*(np.asarray(each)[rows] for each in known)),
            weights[rows],
        ),
        split,
    )
    num_steps = np.int32(request.num_steps)
    return Inputs(
        z=noise if given is None else z,
        keys=keys,
        condition=condition,
        null=network.null if request.null is None else request.null,
        known=kept,
        w=w,
        num_steps=num_steps,
        first=num_steps if request.first is None else np.int32(request.first),
    )
