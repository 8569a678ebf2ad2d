"""Loss weightings, and the squared error that all diffusion stages share.

The papers write omega(lambda) ||x_hat - x||^2. At a fixed z the errors of x and v are proportional,
x_hat - x = -sigma (v_hat - v), so the same loss is sigma^2 omega ||v_hat - v||^2, whose weights lie in
[0, 1] at every noise level (Salimans & Ho 2022, section 4):

    name            omega                    on the v error
    snr             alpha^2/sigma^2          alpha^2                 (the plain eps error)
    truncated_snr   max(alpha^2/sigma^2, 1)  max(alpha^2, sigma^2)   (the larger of the x and eps errors)
    snr_plus_one    1 + alpha^2/sigma^2      1                       (the plain v error)
"""

from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from guided_distill import kinds
from guided_distill.diffusion.process import Prediction, alike_when_clipped, velocity

WEIGHTINGS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "snr": lambda log_snr: jax.nn.sigmoid(log_snr),
    "truncated_snr": lambda log_snr: jax.nn.sigmoid(jnp.abs(log_snr)),
    "snr_plus_one": lambda log_snr: jnp.ones_like(log_snr),
}

Weighting = Annotated[str, kinds.OneOf(WEIGHTINGS)]


class Loss(NamedTuple):
    """The result of an objective: the loss of each example [B], and named figures [B] to log."""

    per_example: jax.Array
    aux: dict[str, jax.Array]


def prediction_loss(
    prediction: Prediction,
    target: Prediction,
    *,
    log_snr: jax.Array,
    weighting: str,
    clipped: bool = False,
) -> Loss:
    """Return the weighted squared error of v of two predictions at the same z, averaged over dimensions.

    log_snr: [B]. clipped: for samplers that clip x; a pixel has no error where the prediction and the
    target are both beyond the same end of the range. The aux figure "v_error" is the error without its
    weight.
    """
    error = velocity(prediction, log_snr) - velocity(target, log_snr)
    if clipped:
        error = jnp.where(alike_when_clipped(prediction.x, target.x), 0.0, error)
    v_error = jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))
    return Loss(WEIGHTINGS[weighting](log_snr) * v_error, {"v_error": v_error})
