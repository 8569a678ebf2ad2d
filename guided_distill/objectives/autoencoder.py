"""The autoencoder: its latents decode to images and stay close to a unit Gaussian."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from guided_distill import draws, kinds
from guided_distill.objectives.stage import Optimization
from guided_distill.objectives.weighting import Loss

NOT_OPTIONS = ("image_channels", "scaling_factor", "dtype", "parent", "name")
"""Fields of the autoencoder's module that the run or Flax sets, not a config's options."""


@dataclass(frozen=True)
class Autoencoder(Optimization):
    """Settings of the run's own autoencoder."""

    steps: kinds.Whole = 0
    """The number of updates. With 0 the run has no autoencoder, and diffuses the data itself."""
    kl_weight: kinds.NotNegative = 1e-3
    """The weight of the latents' KL divergence from a unit Gaussian in the loss."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of guided_distill.models.stable_diffusion.autoencoder.AutoencoderKL."""


def autoencoder_loss(
    autoencoder: nn.Module,
    params: Mapping[str, Any],
    x: jax.Array,
    keys: jax.Array,
    *,
    kl_weight: float,
) -> Loss:
    """Return the mean absolute error of x [B, H, W, C] from drawn latents, plus their weighted KL.

    autoencoder: a module with the methods encode(x), which returns mean and log variance, and
    decode(latents). keys: [B], to draw the latents. The KL divergence of the latents from N(0, I) is a
    mean over their dimensions, so that kl_weight has the same effect at every size. Rombach et al. 2022,
    section 3.1, without the adversarial and the perceptual loss. Aux: "error" and "kl".
    """
    model: Any = autoencoder.bind({"params": params})
    mean, log_variance = model.encode(x)
    deviation = jnp.exp(0.5 * log_variance)
    decoded = model.decode(mean + deviation * draws.normals(keys, mean.shape[1:]))
    dimensions = tuple(range(1, x.ndim))
    error = jnp.mean(jnp.abs(decoded - x), axis=dimensions)
    divergence = 0.5 * (jnp.square(mean) + jnp.square(deviation) - 1.0 - log_variance)
    kl = jnp.mean(divergence, axis=dimensions)
    return Loss(error + kl_weight * kl, {"error": error, "kl": kl})
