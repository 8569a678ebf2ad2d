"""Noise schedules, each a function log_snr(t) that falls with t in [0, 1].

A variance-preserving process is told wholly by its log signal-to-noise ratio, lambda in the papers:

    alpha_t^2 = sigmoid(log_snr(t)),    sigma_t^2 = sigmoid(-log_snr(t)),    alpha^2 + sigma^2 = 1.

t = 0 is clean data, t = 1 pure noise.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Schedule = Callable[[jax.Array], jax.Array]

LOG_SNR_LIMIT = 20.0
"""Where the papers truncate the log-SNR: sigma_0 = alpha_1 = 4.5e-5."""

NUM_TIMESTEPS = 1000
"""Length of the discrete chains of DDPM and Stable Diffusion."""


def alpha_sigma(log_snr: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Signal and noise levels (alpha, sigma), each of log_snr's shape, in [0, 1]."""
    return jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))


@functools.cache
def cosine(log_snr_min: float = -LOG_SNR_LIMIT, log_snr_max: float = LOG_SNR_LIMIT) -> Schedule:
    """The cosine schedule alpha_t = cos(pi t / 2), truncated in log-SNR.

    log_snr(t) = -2 log tan(a t + b), with a and b set by the two ends (Ho & Salimans 2022,
    "Classifier-Free Diffusion Guidance", section 2; Salimans & Ho 2022, section 2).
    """
    angle_at_0 = math.atan(math.exp(-0.5 * log_snr_max))
    complement_at_1 = math.atan(math.exp(0.5 * log_snr_min))
    span = 0.5 * math.pi - angle_at_0 - complement_at_1

    def log_snr(t: jax.Array) -> jax.Array:
        # cos(y) is taken as sin(pi/2 - y), so that float32 keeps its precision near t = 1.
        signal = jnp.sin(span * (1.0 - t) + complement_at_1)
        noise = jnp.sin(span * t + angle_at_0)
        return 2.0 * (jnp.log(signal) - jnp.log(noise))

    return log_snr


def from_betas(betas: np.ndarray) -> Schedule:
    """The schedule of a discrete chain with per-step noise variances `betas` [T]: a step function.

    Time t stands for index i = round(T t) - 1 of the chain, as in `timestep_index`; what rounds to
    t = 0 is clean data, at LOG_SNR_LIMIT. The grids i/N of N = 1, 2, 4, ... nest.
    """
    log_alpha_bar = np.cumsum(np.log1p(-np.asarray(betas, np.float64)))
    knots = log_alpha_bar - np.log(-np.expm1(log_alpha_bar))
    values = np.concatenate([[LOG_SNR_LIMIT], knots]).astype(np.float32)
    return lambda t: jnp.asarray(values)[jnp.round(t * len(betas)).astype(jnp.int32)]


@functools.cache
def linear(beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """Betas linear in the index over 1000 steps (Ho et al. 2020, "DDPM", section 4)."""
    return from_betas(np.linspace(beta_start, beta_end, NUM_TIMESTEPS))


@functools.cache
def scaled_linear(beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
    """Betas linear in their square root over 1000 steps: the schedule of Stable Diffusion 1 and 2."""
    return from_betas(np.linspace(beta_start**0.5, beta_end**0.5, NUM_TIMESTEPS) ** 2)


def shifted(schedule: Schedule, factor: float) -> Schedule:
    """`schedule` with its signal-to-noise ratio divided by factor^2.

    Used at higher resolutions, where neighbouring pixels average the noise away
    (Hoogeboom et al. 2023, "simple diffusion", section 3).
    """
    return lambda t: schedule(t) - 2.0 * math.log(factor)


def arrival(schedule: Schedule, t: jax.Array) -> jax.Array:
    """The log-SNR that a step of a sampler to time t lands on: that of the schedule, infinite at t = 0.

    Samplers return x itself there, for alpha_0 of a truncated schedule isn't exactly 1 (Salimans & Ho
    2022, official code).
    """
    return jnp.where(t == 0.0, jnp.inf, schedule(t))


def timestep_index(t: jax.Array, num_timesteps: int = NUM_TIMESTEPS) -> jax.Array:
    """Index in 0..T-1 of a discrete chain, as a float, that time t in [0, 1] stands for.

    t = 0 lies before the chain's start and takes its first index.
    """
    return jnp.maximum(jnp.round(t * num_timesteps) - 1.0, 0.0)


CHAINS = ("linear", "scaled_linear")
"""The schedules of SCHEDULES that have NUM_TIMESTEPS noise levels, and no more."""

SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "cosine": cosine,
    "linear": linear,
    "scaled_linear": scaled_linear,
}
