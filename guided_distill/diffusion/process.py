"""The mathematics of the diffusion process on one page.

Variance-preserving diffusion (Salimans & Ho 2022, "Progressive Distillation", PD; Ho & Salimans
2022, "Classifier-Free Diffusion Guidance", CFG; Meng et al. 2023, "On Distillation of Guided
Diffusion Models"). Below, lambda = log_snr, alpha^2 = sigmoid(lambda), sigma^2 = sigmoid(-lambda),
and s < t:

    (1)  z_t = alpha_t x + sigma_t eps,   eps ~ N(0, I)                      noising        PD
    (2)  v   = alpha_t eps - sigma_t x                                       velocity       PD
         x   = alpha_t z_t - sigma_t v,   eps = sigma_t z_t + alpha_t v
         two heads, x' and eps', are read as x = sigma_t^2 x' + alpha_t (z_t - sigma_t eps'),
         which is the same as v = alpha_t eps' - sigma_t x'
    (3)  z_s = alpha_s x_hat + sigma_s eps_hat                               DDIM step      PD
         with eps_hat = (z_t - alpha_t x_hat) / sigma_t; run with s > t it encodes
    (4)  q(z_s | z_t, x) = N(r (alpha_s/alpha_t) z_t + (1 - r) alpha_s x,    posterior      CFG
                             (1 - r) sigma_s^2),   r = exp(lambda_t - lambda_s)
    (5)  q(z_t | z_s)    = N((alpha_t/alpha_s) z_s,                          forward hop    CFG
                             (1 - exp(lambda_t - lambda_s)) sigma_t^2)
    (6)  x~   = (1 - c) x_1 + c x_2,      c = (1 - q_s/q_h) / (1 - q_s/q_t)  two steps      PD alg. 2
         eps~ = (1 - d) eps_1 + d eps_2,  d = c q_h/q_t,   q = sigma/alpha   in one
         DDIM moves z/sigma by the change of 1/q times x_hat, and z/alpha by that of q times eps_hat.
         So the steps t -> h of (x_1, eps_1) and h -> s of (x_2, eps_2) make one step t -> s of their
         means, each weighed by its share of the way, with s on either side of t:
             to data       q_s = 0, c = 1: x~ is x_2, and eps~ what then is left of z_t
             h = s         c = d = 0: there is no second step
             from data     q_t = sigma_0/alpha_0: d is finite and c near 0, for x~ is almost z_t
    (7)  x_w = (1 + w) x_hat(z, c) - w x_hat(z)                              guidance       CFG eq. 6

A prediction is carried as the pair (x, eps): DDIM is then one line, and each is computed from the
network's own output without dividing by a sigma or an alpha that may be near zero.
Arrays: z, x, eps, v are [B, ...]; log_snr is [B].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from guided_distill.diffusion.schedules import alpha_sigma


class Prediction(NamedTuple):
    """A denoiser's prediction from z_t: the clean x and the noise eps, [B, ...] each, related by (1)."""

    x: jax.Array
    eps: jax.Array


def broadcast_to_rank(per_example: jax.Array, like: jax.Array) -> jax.Array:
    """Reshape [B] to [B, 1, ..., 1], with the rank of `like`."""
    return per_example.reshape(per_example.shape + (1,) * (like.ndim - per_example.ndim))


def levels(log_snr: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (alpha, sigma) at log_snr [B], shaped to multiply `like` [B, ...]."""
    return alpha_sigma(broadcast_to_rank(log_snr, like))


def rise(log_snr_t: jax.Array, log_snr_s: jax.Array) -> jax.Array:
    """Return log_snr_s - log_snr_t, or 0 where both are infinite, as they are for clean data."""
    return jnp.where(log_snr_s == log_snr_t, 0.0, log_snr_s - log_snr_t)


def add_noise(x: jax.Array, eps: jax.Array, *, log_snr: jax.Array) -> jax.Array:
    """Equation (1): z_t from clean x and noise eps."""
    alpha, sigma = levels(log_snr, x)
    return alpha * x + sigma * eps


Converter = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

# (source, target) -> f(source, z, alpha, sigma), from (1) and (2).
CONVERTERS: dict[tuple[str, str], Converter] = {
    ("x", "x"): lambda x, z, alpha, sigma: x,
    ("x", "eps"): lambda x, z, alpha, sigma: (z - alpha * x) / sigma,
    ("x", "v"): lambda x, z, alpha, sigma: (alpha * z - x) / sigma,
    ("eps", "x"): lambda eps, z, alpha, sigma: (z - sigma * eps) / alpha,
    ("eps", "eps"): lambda eps, z, alpha, sigma: eps,
    ("eps", "v"): lambda eps, z, alpha, sigma: (eps - sigma * z) / alpha,
    ("v", "x"): lambda v, z, alpha, sigma: alpha * z - sigma * v,
    ("v", "eps"): lambda v, z, alpha, sigma: sigma * z + alpha * v,
    ("v", "v"): lambda v, z, alpha, sigma: v,
}

PARAMETERIZATIONS = ("x", "eps", "v", "x_and_eps")


def convert(
    value: jax.Array, *, source: str, target: str, z: jax.Array, log_snr: jax.Array
) -> jax.Array:
    """Convert one of "x", "eps" and "v" at z [B, ...] to another.

    Raises KeyError for other names.
    """
    return CONVERTERS[source, target](value, z, *levels(log_snr, z))


def prediction_from(
    value: jax.Array, *, source: str, z: jax.Array, log_snr: jax.Array
) -> Prediction:
    """Return the pair (x, eps) for a network's output `value` at z [B, ..., C].

    source: one of PARAMETERIZATIONS. For "x_and_eps", value is [B, ..., 2C], x' before eps'.
    """
    if source == "x_and_eps":
        value = velocity(Prediction(*jnp.split(value, 2, axis=-1)), log_snr)
        source = "v"
    x, eps = (
        convert(value, source=source, target=target, z=z, log_snr=log_snr)
        for target in ("x", "eps")
    )
    return Prediction(x, eps)


def velocity(prediction: Prediction, log_snr: jax.Array) -> jax.Array:
    """Equation (2): v of a prediction."""
    alpha, sigma = levels(log_snr, prediction.x)
    return alpha * prediction.eps - sigma * prediction.x


def clip_x(prediction: Prediction, *, z: jax.Array, log_snr: jax.Array) -> Prediction:
    """Return the prediction with x clipped to the pixel range [-1, 1] and eps recomputed to match it.

    Samplers of images do this at every step (PD, official code).
    """
    x = jnp.clip(prediction.x, -1.0, 1.0)
    eps = convert(x, source="x", target="eps", z=z, log_snr=log_snr)
    return Prediction(x, jnp.where(x == prediction.x, prediction.eps, eps))


def alike_when_clipped(x: jax.Array, y: jax.Array, *, tolerance: float = 1e-3) -> jax.Array:
    """Where x and y lie at or beyond the same end of [-1, 1], so that `clip_x` makes them equal."""
    end = 1.0 - tolerance
    return ((x >= end) & (y >= end)) | ((x <= -end) & (y <= -end))


def ddim_step(prediction: Prediction, log_snr_s: jax.Array) -> jax.Array:
    """Equation (3): the deterministic step to the noise level log_snr_s, in either direction."""
    return add_noise(prediction.x, prediction.eps, log_snr=log_snr_s)


def posterior_step(
    prediction: Prediction,
    noise: jax.Array,
    *,
    z: jax.Array,
    log_snr_t: jax.Array,
    log_snr_s: jax.Array,
    variance_interpolation: float = 0.0,
) -> jax.Array:
    """Equation (4): sample z_s given z_t, with unit Gaussian `noise`.

    The log variance goes from that of q(z_s|z_t,x) at `variance_interpolation` 0 to that of
    q(z_t|z_s) at 1 (CFG section 2; the paper's 64x64 models use 0.3).
    """
    alpha_t, sigma_t = levels(log_snr_t, z)
    alpha_s, sigma_s = levels(log_snr_s, z)
    fall = broadcast_to_rank(-rise(log_snr_t, log_snr_s), z)
    ratio, rest = jnp.exp(fall), -jnp.expm1(fall)
    mean = ratio * (alpha_s / alpha_t) * z + rest * alpha_s * prediction.x
    sigma = sigma_s ** (1.0 - variance_interpolation) * sigma_t**variance_interpolation
    return mean + jnp.sqrt(rest) * sigma * noise


def forward_hop(
    z: jax.Array, noise: jax.Array, *, log_snr_s: jax.Array, log_snr_t: jax.Array
) -> jax.Array:
    """Equation (5): sample the noisier z_t given z_s = `z`, with unit Gaussian `noise`."""
    alpha_s, _ = levels(log_snr_s, z)
    alpha_t, sigma_t = levels(log_snr_t, z)
    rest = -jnp.expm1(broadcast_to_rank(-rise(log_snr_t, log_snr_s), z))
    return (alpha_t / alpha_s) * z + jnp.sqrt(rest) * sigma_t * noise


def two_steps_in_one(
    first: Prediction,
    second: Prediction,
    *,
    log_snr_t: jax.Array,
    log_snr_h: jax.Array,
    log_snr_s: jax.Array,
) -> Prediction:
    """Equation (6): the prediction whose one DDIM step t -> s is `first`'s t -> h and `second`'s h -> s.

    If h is s, `second` has no effect. x lies between the two, so clipped predictions stay clipped.
    """
    # 1 - q_s/q_h is computed with expm1, because a difference of levels would lose precision.
    rest = jnp.expm1(-0.5 * rise(log_snr_h, log_snr_s))
    whole = jnp.expm1(-0.5 * rise(log_snr_t, log_snr_s))
    c = rest / whole
    d = c * jnp.exp(-0.5 * rise(log_snr_t, log_snr_h))
    return Prediction(_mean(first.x, second.x, c), _mean(first.eps, second.eps, d))


def _mean(first: jax.Array, second: jax.Array, share: jax.Array) -> jax.Array:
    """Return the mean of arrays [B, ...], with weight `share` [B] on `second`; exact for 0 and 1."""
    share = broadcast_to_rank(share, first)
    return (1.0 - share) * first + share * second
