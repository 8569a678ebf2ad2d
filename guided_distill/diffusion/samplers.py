"""Samplers: plain functions over predict(z, t) -> Prediction, on the uniform grid t = i/N.

`schedule` is log_snr(t). num_steps may be a traced integer, so one compilation serves every N.
Samplers that draw noise take one typed key per example, of `step_keys`, so that a sample depends on
its own seed alone. Every sampler but `encode` starts from z at t = n/N, n being `first` (N for pure
noise), calls predict n times, and returns the last x: shapes [B, ...] throughout.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import io_callback
from jax.typing import ArrayLike

from guided_distill import draws
from guided_distill.diffusion.process import (
    Prediction,
    broadcast_to_rank,
    ddim_step,
    forward_hop,
    levels,
    posterior_step,
)
from guided_distill.diffusion.schedules import Schedule, arrival

Predict = Callable[[jax.Array, jax.Array], Prediction]

ENCODE = "encode"
"""What takes the place of a sampler's name, in configs and checkpoints, where `encode` is meant."""


_STEPS = 2**32 - 1
"""The index that stands for the steps' noise where others stand for samples."""

_fold_in_each = jax.vmap(jax.random.fold_in, in_axes=(None, 0))


def initial_noise(key: jax.Array, indices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Unit noise [B, *shape] to start from, one for each global sample index [B]."""
    return draws.normals(_fold_in_each(key, indices), shape)


def step_keys(key: jax.Array, indices: jax.Array) -> jax.Array:
    """Keys [B] of the noise that steps draw, one for each global sample index [B].

    They come from a key that draws nothing itself: a word of a key's draws is also the key that an index
    makes of it.
    """
    return _fold_in_each(jax.random.fold_in(key, _STEPS), indices)


def _time(i: jax.Array, num_steps: jax.Array, z: jax.Array) -> jax.Array:
    """Time i/N for each example, held at 0 from below."""
    return jnp.full(z.shape[:1], jnp.maximum(i, 0) / num_steps, jnp.float32)


def _step_noise(keys: jax.Array, i: jax.Array, z: jax.Array) -> jax.Array:
    return draws.normals(draws.fold_in(keys, i), z.shape[1:])


def ddim(
    predict: Predict,
    schedule: Schedule,
    z: jax.Array,
    keys: jax.Array,
    num_steps: jax.Array,
    first: jax.Array | None = None,
) -> jax.Array:
    """Deterministic sampling, equation (3) each time. `keys` is not used."""
    del keys
    start = num_steps if first is None else first

    def body(n: jax.Array, z: jax.Array) -> jax.Array:
        i = start - n
        prediction = predict(z, _time(i, num_steps, z))
        return ddim_step(prediction, arrival(schedule, _time(i - 1, num_steps, z)))

    return jax.lax.fori_loop(0, start, body, z)


def ancestral(
    predict: Predict,
    schedule: Schedule,
    z: jax.Array,
    keys: jax.Array,
    num_steps: jax.Array,
    first: jax.Array | None = None,
) -> jax.Array:
    """Ancestral (DDPM) sampling, equation (4) each time."""
    start = num_steps if first is None else first

    def body(n: jax.Array, z: jax.Array) -> jax.Array:
        i = start - n
        t = _time(i, num_steps, z)
        prediction = predict(z, t)
        return posterior_step(
            prediction,
            _step_noise(keys, i, z),
            z=z,
            log_snr_t=schedule(t),
            log_snr_s=arrival(schedule, _time(i - 1, num_steps, z)),
        )

    return jax.lax.fori_loop(0, start, body, z)


def stochastic(
    predict: Predict,
    schedule: Schedule,
    z: jax.Array,
    keys: jax.Array,
    num_steps: jax.Array,
    first: jax.Array | None = None,
) -> jax.Array:
    """The paper's stochastic N-step sampler (Meng et al. 2023).

    From t a DDIM jump over two grid steps to t - 2/N, then noise back over one to t - 1/N; from
    t = 1/N a plain jump to 0. It needs a student trained on these jumps.
    """
    start = num_steps if first is None else first

    def body(n: jax.Array, z: jax.Array) -> jax.Array:
        i = start - n
        prediction = predict(z, _time(i, num_steps, z))
        log_snr_k = arrival(schedule, _time(i - 2, num_steps, z))
        return forward_hop(
            ddim_step(prediction, log_snr_k),
            _step_noise(keys, i, z),
            log_snr_s=log_snr_k,
            log_snr_t=arrival(schedule, _time(i - 1, num_steps, z)),
        )

    return jax.lax.fori_loop(0, start, body, z)


def dpm_solver_pp(
    predict: Predict,
    schedule: Schedule,
    z: jax.Array,
    keys: jax.Array,
    num_steps: jax.Array,
    first: jax.Array | None = None,
) -> jax.Array:
    """DPM-Solver++(2M), first order at both ends (Lu et al. 2022, algorithm 2). `keys` is not used.

    With h half the rise of the log-SNR over a step and r = h_previous / h:
    z_s = (sigma_s/sigma_t) z - alpha_s (exp(-h) - 1) (x + (x - x_previous) / (2 r)).
    """
    del keys
    start = num_steps if first is None else first

    def body(
        n: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        z, previous_x, previous_h = carry
        i = start - n
        t, s = _time(i, num_steps, z), _time(i - 1, num_steps, z)
        x = predict(z, t).x
        log_snr_t, log_snr_s = schedule(t), arrival(schedule, s)
        h = 0.5 * (log_snr_s - log_snr_t)
        second_order = (n > 0) & (i > 1)
        slope = jnp.where(second_order, h / (2.0 * previous_h), 0.0)
        data = x + broadcast_to_rank(slope, z) * (x - previous_x)
        _, sigma_t = levels(log_snr_t, z)
        alpha_s, sigma_s = levels(log_snr_s, z)
        z_s = (sigma_s / sigma_t) * z - alpha_s * broadcast_to_rank(jnp.expm1(-h), z) * data
        return z_s, x, h

    carry = (z, jnp.zeros_like(z), jnp.ones(z.shape[:1], z.dtype))
    return jax.lax.fori_loop(0, start, body, carry)[0]


def encode(predict: Predict, schedule: Schedule, x: jax.Array, num_steps: jax.Array) -> jax.Array:
    """Data to noise: DDIM run forwards from t = 0, predict called at t = 0, 1/N ... (N-1)/N.

    What is known of the noise at t = 0 is eps alone, for z is x there but for sigma_0 = 4.5e-5: predict
    must tell eps without dividing by sigma_0, as networks of v and eps do. For the same reason there is
    no clipping of x on the way.
    """

    def body(i: jax.Array, z: jax.Array) -> jax.Array:
        prediction = predict(z, _time(i, num_steps, z))
        return ddim_step(prediction, schedule(_time(i + 1, num_steps, z)))

    return jax.lax.fori_loop(0, num_steps, body, x)


class Known(NamedTuple):
    """What in-painting keeps: the clean x [B, ...] and the noise eps that noises it, outside of `free`.

    free: bool [B, ...], broadcast against x, True where the sampler paints.
    """

    x: ArrayLike
    eps: ArrayLike
    free: ArrayLike


def keeping(predict: Predict, known: Known) -> Predict:
    """`predict` with what is known in the place of its own: samplers then pass through its noisings."""

    def kept(z: jax.Array, t: jax.Array) -> Prediction:
        own = predict(z, t)
        return Prediction(
            jnp.where(known.free, own.x, known.x), jnp.where(known.free, own.eps, known.eps)
        )

    return kept


def watched(predict: Predict, callback: Callable[[jax.Array, jax.Array], None]) -> Predict:
    """`predict`, whose every call also calls back on the host with its t [B] and its x, in any order."""

    def watching(z: jax.Array, t: jax.Array) -> Prediction:
        prediction = predict(z, t)
        io_callback(callback, None, t, prediction.x)
        return prediction

    return watching


Sampler = Callable[..., jax.Array]
"""f(predict, schedule, z, keys, num_steps, first=None), as those above."""

SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "ancestral": ancestral,
    "stochastic": stochastic,
    "dpm_solver_pp": dpm_solver_pp,
}
