"""Noise schedules, each a function log_snr(t) that falls with t in [0, 1].

A variance-preserving process is fully defined by its log signal-to-noise ratio, lambda in the papers:

    alpha_t^2 = sigmoid(log_snr(t)),    sigma_t^2 = sigmoid(-log_snr(t)),    alpha^2 + sigma^2 = 1.

t = 0 is clean data, t = 1 pure noise.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from guided_distill import kinds
from guided_distill.errors import UserError

Schedule = Callable[[jax.Array], jax.Array]

LOG_SNR_LIMIT = 20.0
"""Where the papers truncate the log-SNR: sigma_0 = alpha_1 = 4.5e-5."""

NUM_TIMESTEPS = 1000
"""Length of the discrete chains of DDPM and Stable Diffusion."""

LogSnr = Annotated[float, kinds.Range(-60, 60)]
Beta = Annotated[float, kinds.Range(0, 1, above=True, below=True)]
"""Options of schedules: log-SNRs for which float32 can represent alpha and sigma; a step's variance."""


def alpha_sigma(log_snr: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the signal and noise levels (alpha, sigma) in [0, 1], each with log_snr's shape."""
    return jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))


@functools.cache
def cosine(log_snr_min: LogSnr = -LOG_SNR_LIMIT, log_snr_max: LogSnr = LOG_SNR_LIMIT) -> Schedule:
    """The cosine schedule alpha_t = cos(pi t / 2), truncated in log-SNR.

    log_snr(t) = -2 log tan(a t + b), with a and b set by the two ends (Ho & Salimans 2022,
    "Classifier-Free Diffusion Guidance", section 2; Salimans & Ho 2022, section 2).
    """
    angle_at_0 = math.atan(math.exp(-0.5 * log_snr_max))
    complement_at_1 = math.atan(math.exp(0.5 * log_snr_min))
    span = 0.5 * math.pi - angle_at_0 - complement_at_1

    def log_snr(t: jax.Array) -> jax.Array:
        # cos(y) is computed as sin(pi/2 - y), so that float32 keeps its precision near t = 1.
        signal = jnp.sin(span * (1.0 - t) + complement_at_1)
        noise = jnp.sin(span * t + angle_at_0)
        return 2.0 * (jnp.log(signal) - jnp.log(noise))

    return log_snr


def from_betas(betas: np.ndarray) -> Schedule:
    """Return the schedule of a discrete chain with per-step noise variances `betas` [T]: a step function.

    Time t corresponds to index i = round(T t) - 1 of the chain, as in `timestep_index`; times that round
    to t = 0 are clean data, at LOG_SNR_LIMIT. The grids i/N for N = 1, 2, 4, ... nest.
    """
    values = _chain(betas).astype(np.float32)
    return lambda t: jnp.asarray(values)[jnp.round(t * len(betas)).astype(jnp.int32)]


def _chain(betas: np.ndarray) -> np.ndarray:
    """Return log-SNRs [T + 1]: LOG_SNR_LIMIT for clean data, then that of every index of a chain."""
    log_alpha_bar = np.cumsum(np.log1p(-np.asarray(betas, np.float64)))
    return np.concatenate([[LOG_SNR_LIMIT], log_alpha_bar - np.log(-np.expm1(log_alpha_bar))])


@functools.cache
def linear(beta_start: Beta = 1e-4, beta_end: Beta = 0.02) -> Schedule:
    """Betas linear in the index over 1000 steps (Ho et al. 2020, "DDPM", section 4)."""
    return from_betas(_BETAS["linear"](beta_start, beta_end))


@functools.cache
def scaled_linear(beta_start: Beta = 0.00085, beta_end: Beta = 0.012) -> Schedule:
    """Betas whose square roots are linear over 1000 steps: the schedule of Stable Diffusion 1 and 2."""
    return from_betas(_BETAS["scaled_linear"](beta_start, beta_end))


_BETAS: dict[str, Callable[[float, float], np.ndarray]] = {
    "linear": lambda start, end: np.linspace(start, end, NUM_TIMESTEPS),
    "scaled_linear": lambda start, end: np.linspace(start**0.5, end**0.5, NUM_TIMESTEPS) ** 2,
}


def shifted(schedule: Schedule, factor: float) -> Schedule:
    """Return `schedule` with its signal-to-noise ratio divided by factor^2.

    Used at higher resolutions, where averaging over neighbouring pixels removes noise
    (Hoogeboom et al. 2023, "simple diffusion", section 3).
    """
    return lambda t: schedule(t) - 2.0 * math.log(factor)


def arrival(schedule: Schedule, t: jax.Array) -> jax.Array:
    """Return the log-SNR at the end of a sampler's step to time t: the schedule's, but infinite at t = 0.

    At t = 0, samplers return x itself, because alpha_0 of a truncated schedule isn't exactly 1 (Salimans
    & Ho 2022, official code).
    """
    return jnp.where(t == 0.0, jnp.inf, schedule(t))


def timestep_index(t: jax.Array, num_timesteps: int = NUM_TIMESTEPS) -> jax.Array:
    """Return the index in 0..T-1 of a discrete chain, as a float, for time t in [0, 1].

    t = 0 lies before the chain's start and gets the first index.
    """
    return jnp.maximum(jnp.round(t * num_timesteps) - 1.0, 0.0)


CHAINS = tuple(_BETAS)
"""The schedules in SCHEDULES that have only NUM_TIMESTEPS discrete noise levels."""

SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "cosine": cosine,
    "linear": linear,
    "scaled_linear": scaled_linear,
}


def _knots(name: str, options: Mapping[str, float]) -> np.ndarray:
    """Return log-SNRs at rising times, including both ends. Uses NumPy only, to avoid starting JAX."""
    parameters = inspect.signature(SCHEDULES[name]).parameters
    first, second = (options.get(each.name, each.default) for each in parameters.values())
    return _chain(_BETAS[name](first, second)) if name in _BETAS else np.array([second, first])


def last_log_snr(name: str, options: Mapping[str, float]) -> float:
    """Return log_snr(1) of SCHEDULES[name](**options)."""
    return float(_knots(name, options)[-1])


def check_schedule(name: str, options: Mapping[str, float]) -> None:
    """Raise UserError, naming the key, unless SCHEDULES[name](**options) is a valid schedule.

    The log-SNR must fall with time, and float32 must be able to represent its levels.
    """
    parameters = inspect.signature(SCHEDULES[name]).parameters
    for option, value in options.items():
        where = f"config.model.schedule_options.{option}"
        if option not in parameters:
            raise UserError(f"{where} is not an option of {name}; it has {', '.join(parameters)}")
        kind = parameters[option].annotation
        kinds.check(where, kinds.parse_value(where, value, kind), kind)
    knots = _knots(name, options)
    if not np.all(np.diff(knots) < 0):
        raise UserError(
            f"config.model.schedule_options give {name} a log-SNR that doesn't fall at every step from "
            f"t = 0, where it is {knots[0]:g}, to t = 1: choose values nearer to the defaults"
        )
    kinds.check("the log-SNR that config.model.schedule_options end at", knots[-1], LogSnr)


def loses_x(name: str, options: Mapping[str, float]) -> bool:
    """Whether x = (z - sigma eps) / alpha is lost at t = 1, where alpha is below 0.01.

    A network's error of 0.01 in eps is then one of more than 1 in x, which is as large as the data. Under
    every weighting but snr, whose loss is the error of eps itself, t = 1 drowns all other times.
    """
    return last_log_snr(name, options) < -2.0 * math.log(100.0)
