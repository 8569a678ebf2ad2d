"""Samplers: the step of each, which calls predict(z, t) -> Prediction on the uniform grid t = i/N.

`schedule` is log_snr(t). num_steps may be a traced integer, so one compilation serves every N.
Samplers that draw noise take one typed key per example, from `step_keys`, so that a sample depends only
on its own seed. All arrays are [B, ...].
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
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
"""The name of `encode` in configs and checkpoints, where others have a sampler's name."""


_STEPS = 2**32 - 1
"""The index of the steps' noise; all other indices are those of samples."""

_fold_in_each = jax.vmap(jax.random.fold_in, in_axes=(None, 0))


def initial_noise(key: jax.Array, indices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return unit Gaussian noise [B, *shape] to start from, for global sample indices [B]."""
    return draws.normals(_fold_in_each(key, indices), shape)


def step_keys(key: jax.Array, indices: jax.Array) -> jax.Array:
    """Return keys [B] for the noise of the steps, for global sample indices [B].

    They are folded from a key that draws nothing itself, because a word that a key draws can equal a key
    that is folded from it.
    """
    return _fold_in_each(jax.random.fold_in(key, _STEPS), indices)


def _time(i: jax.Array, num_steps: jax.Array, z: jax.Array) -> jax.Array:
    """Return the time i/N for each example, but at least 0."""
    return jnp.full(z.shape[:1], jnp.maximum(i, 0) / num_steps, jnp.float32)


def _step_noise(keys: jax.Array, i: jax.Array, z: jax.Array) -> jax.Array:
    return draws.normals(draws.fold_in(keys, i), z.shape[1:])


State = tuple[jax.Array, ...]
"""The arrays that a sampler passes from step to step; the first is z."""

Step = Callable[[jax.Array, State], tuple[State, jax.Array]]
"""f(i, the state at t = i/N) -> (the state at t = (i - 1)/N, the x predicted at t = i/N)."""


def _z_alone(z: jax.Array) -> State:
    return (z,)


@dataclass(frozen=True)
class Sampler:
    """A function from z at t = first/N to data at t = 0, which repeats a step.

    step: f(predict, schedule, keys, num_steps) -> Step. begin: f(z) -> the state of the first step.
    deterministic: whether the sample depends on z alone.
    """

    step: Callable[..., Step]
    begin: Callable[[jax.Array], State] = _z_alone
    deterministic: bool = True

    def __call__(
        self,
        predict: Predict,
        schedule: Schedule,
        z: jax.Array,
        keys: jax.Array,
        num_steps: jax.Array,
        first: jax.Array | None = None,
    ) -> jax.Array:
        """Return the sample after `first` steps from z; by default N steps, from pure noise."""
        start = num_steps if first is None else first
        step = self.step(predict, schedule, keys, num_steps)
        return jax.lax.fori_loop(
            0, start, lambda n, state: step(start - n, state)[0], self.begin(z)
        )[0]

    def predictions(
        self,
        predict: Predict,
        schedule: Schedule,
        z: jax.Array,
        keys: jax.Array,
        num_steps: jax.Array,
        *,
        room: int,
    ) -> jax.Array:
        """Return the x [room, B, ...] that each step from pure noise predicts; zeros after the N-th.

        room: static and at least N, so that one compilation serves every N up to it.
        """
        step = self.step(predict, schedule, keys, num_steps)

        def body(n: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
            state, x = step(num_steps - n, carry[0])
            return state, carry[1].at[n].set(x)

        found = jnp.zeros((room, *z.shape), z.dtype)
        return jax.lax.fori_loop(0, num_steps, body, (self.begin(z), found))[1]


@Sampler
def ddim(predict: Predict, schedule: Schedule, keys: jax.Array, num_steps: jax.Array) -> Step:
    """Deterministic sampling, equation (3) in each step. `keys` is not used."""
    del keys

    def step(i: jax.Array, state: State) -> tuple[State, jax.Array]:
        (z,) = state
        prediction = predict(z, _time(i, num_steps, z))
        log_snr_s = arrival(schedule, _time(i - 1, num_steps, z))
        return (ddim_step(prediction, log_snr_s),), prediction.x

    return step


@functools.partial(Sampler, deterministic=False)
def ancestral(predict: Predict, schedule: Schedule, keys: jax.Array, num_steps: jax.Array) -> Step:
    """Ancestral (DDPM) sampling, equation (4) in each step."""

    def step(i: jax.Array, state: State) -> tuple[State, jax.Array]:
        (z,) = state
        t = _time(i, num_steps, z)
        prediction = predict(z, t)
        z = posterior_step(
            prediction,
            _step_noise(keys, i, z),
            z=z,
            log_snr_t=schedule(t),
            log_snr_s=arrival(schedule, _time(i - 1, num_steps, z)),
        )
        return (z,), prediction.x

    return step


@functools.partial(Sampler, deterministic=False)
def stochastic(predict: Predict, schedule: Schedule, keys: jax.Array, num_steps: jax.Array) -> Step:
    """The paper's stochastic N-step sampler (Meng et al. 2023).

    Each step is a DDIM jump from t over two grid steps to t - 2/N, then noise is added to go back to
    t - 1/N. From t = 1/N, it is a DDIM jump to 0. The student must be trained on these jumps.
    """

    def step(i: jax.Array, state: State) -> tuple[State, jax.Array]:
        (z,) = state
        prediction = predict(z, _time(i, num_steps, z))
        log_snr_k = arrival(schedule, _time(i - 2, num_steps, z))
        z = forward_hop(
            ddim_step(prediction, log_snr_k),
            _step_noise(keys, i, z),
            log_snr_s=log_snr_k,
            log_snr_t=arrival(schedule, _time(i - 1, num_steps, z)),
        )
        return (z,), prediction.x

    return step


def _without_a_previous_step(z: jax.Array) -> State:
    """Return the first state; its infinite previous h makes the first step first-order."""
    return z, jnp.zeros_like(z), jnp.full(z.shape[:1], jnp.inf, z.dtype)


@functools.partial(Sampler, begin=_without_a_previous_step)
def dpm_solver_pp(
    predict: Predict, schedule: Schedule, keys: jax.Array, num_steps: jax.Array
) -> Step:
    """DPM-Solver++(2M), first order at both ends (Lu et al. 2022, algorithm 2). `keys` is not used.

    With h half the rise of the log-SNR over a step and r = h_previous / h:
    z_s = (sigma_s/sigma_t) z - alpha_s (exp(-h) - 1) (x + (x - x_previous) / (2 r)).
    """
    del keys

    def step(i: jax.Array, state: State) -> tuple[State, jax.Array]:
        z, previous_x, previous_h = state
        t, s = _time(i, num_steps, z), _time(i - 1, num_steps, z)
        x = predict(z, t).x
        log_snr_t, log_snr_s = schedule(t), arrival(schedule, s)
        h = 0.5 * (log_snr_s - log_snr_t)
        slope = jnp.where(i > 1, h / (2.0 * previous_h), 0.0)
        data = x + broadcast_to_rank(slope, z) * (x - previous_x)
        _, sigma_t = levels(log_snr_t, z)
        alpha_s, sigma_s = levels(log_snr_s, z)
        z = (sigma_s / sigma_t) * z - alpha_s * broadcast_to_rank(jnp.expm1(-h), z) * data
        return (z, x, h), x

    return step


def encode(predict: Predict, schedule: Schedule, x: jax.Array, num_steps: jax.Array) -> jax.Array:
    """Encode data to noise: DDIM run forwards from t = 0; calls predict at t = 0, 1/N ... (N-1)/N.

    At t = 0, z equals x up to sigma_0 = 4.5e-5, so only the predicted eps gives information about the
    noise. predict must compute eps without a division by sigma_0, as networks that predict v or eps do.
    For the same reason, x isn't clipped.
    """

    def body(i: jax.Array, z: jax.Array) -> jax.Array:
        prediction = predict(z, _time(i, num_steps, z))
        return ddim_step(prediction, schedule(_time(i + 1, num_steps, z)))

    return jax.lax.fori_loop(0, num_steps, body, x)


class Known(NamedTuple):
    """The known part of an image for in-painting: clean x [B, ...] and noise eps, where not `free`.

    free: bool [B, ...], broadcast against x, True where the sampler paints.
    """

    x: ArrayLike
    eps: ArrayLike
    free: ArrayLike


def keeping(predict: Predict, known: Known) -> Predict:
    """Return `predict` with the known x and eps in place of its own, so that samplers keep them."""

    def kept(z: jax.Array, t: jax.Array) -> Prediction:
        own = predict(z, t)
        return Prediction(
            jnp.where(known.free, own.x, known.x), jnp.where(known.free, own.eps, known.eps)
        )

    return kept


SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "ancestral": ancestral,
    "stochastic": stochastic,
    "dpm_solver_pp": dpm_solver_pp,
}
