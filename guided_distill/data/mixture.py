"""A labelled 2-D Gaussian mixture whose optimal denoiser, and so its guided score, is known exactly.

With x | k ~ N(m_k, s_k^2 I) and z = alpha x + sigma eps, for a component k of weight pi_k:

    z | k     ~ N(alpha m_k, v_k I),  v_k = alpha^2 s_k^2 + sigma^2                           (1)
    E[x|z,k]  = (sigma^2 m_k + alpha s_k^2 z) / v_k                                           (2)
    E[x|z]    = sum_k r_k E[x|z,k],   r = softmax_k(log pi_k + log N(z; alpha m_k, v_k I))    (3)

(2) is written without a difference of nearly equal terms, so float32 serves down to sigma = 5e-5.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from guided_distill import draws


@dataclass(frozen=True, eq=False)
class Mixture:
    """K classes of M isotropic Gaussian components each; classes are equally likely.

    Attributes:
      means: [K, M, 2].
      stds: [K, M], positive.
      weights: [K, M], positive, summing to 1 over each class.
    """

    means: np.ndarray
    stds: np.ndarray
    weights: np.ndarray

    @property
    def num_classes(self) -> int:
        """K; this value as a label means "any class"."""
        return len(self.means)

    def sample(self, key: jax.Array, labels: jax.Array) -> jax.Array:
        """Draws clean points [B, 2] for labels [B] in [0, K)."""
        component_key, noise_key = jax.random.split(key)
        labels = jnp.asarray(labels)
        component = jax.random.categorical(component_key, jnp.log(self.weights)[labels])
        noise = draws.normal(noise_key, (len(labels), 2))
        stds = jnp.asarray(self.stds)[labels, component]
        return jnp.asarray(self.means)[labels, component] + stds[:, None] * noise

    def denoise(
        self, z: jax.Array, alpha: jax.Array, sigma: jax.Array, label: jax.Array
    ) -> jax.Array:
        """E[x | z, label] [B, 2], equation (3).

        z is [B, 2], alpha and sigma are [B], label is int [B] in [0, K]; K is unconditional.
        """
        return jax.vmap(self._posterior_mean)(z, alpha, sigma, label)

    def log_density(
        self, z: jax.Array, alpha: jax.Array, sigma: jax.Array, label: jax.Array
    ) -> jax.Array:
        """log p(z | label) [B] at noise level (alpha, sigma); arguments as in `denoise`."""
        return jax.vmap(lambda *point: logsumexp(self._joint_log_density(*point)))(
            z, alpha, sigma, label
        )

    def _joint_log_density(
        self, z: jax.Array, alpha: jax.Array, sigma: jax.Array, label: jax.Array
    ) -> jax.Array:
        """log p(z, component | label) [K, M] of one point; -inf for other classes' components."""
        variance = self._variance(alpha, sigma)
        squared = jnp.sum((z[None, None] - alpha * self.means) ** 2, axis=-1)
        log_normal = -squared / (2 * variance) - jnp.log(2 * jnp.pi * variance)
        classes = jnp.arange(self.num_classes)
        log_class = jnp.where(
            label == self.num_classes,
            -jnp.log(self.num_classes),
            jnp.where(classes == label, 0.0, -jnp.inf),
        )
        return log_class[:, None] + jnp.log(self.weights) + log_normal

    def _posterior_mean(
        self, z: jax.Array, alpha: jax.Array, sigma: jax.Array, label: jax.Array
    ) -> jax.Array:
        share = jax.nn.softmax(self._joint_log_density(z, alpha, sigma, label), axis=(0, 1))
        drawn = sigma**2 * self.means + (alpha * self.stds**2)[..., None] * z[None, None]
        component_mean = drawn / self._variance(alpha, sigma)[..., None]
        # A sum of products, not a matmul: accelerators round a matmul's inputs to bfloat16.
        return jnp.sum(share[..., None] * component_mean, axis=(0, 1))

    def _variance(self, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        return alpha**2 * self.stds**2 + sigma**2


def _pinwheel(num_classes: int) -> Mixture:
    """Spiral arms, one per class, which start close together and bend away from each other."""
    radii = np.array([0.25, 0.5, 0.75], np.float32)
    bend = np.array([0.0, 0.35, 0.7], np.float32)
    turn = 2 * np.pi * np.arange(num_classes)[:, None] / num_classes + bend
    means = radii[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=-1)
    return Mixture(
        means=means.astype(np.float32),
        stds=np.tile(np.array([0.12, 0.09, 0.06], np.float32), (num_classes, 1)),
        weights=np.tile(np.array([0.5, 0.3, 0.2], np.float32), (num_classes, 1)),
    )


DEFAULT_MIXTURE = _pinwheel(num_classes=4)
