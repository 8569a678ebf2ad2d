"""The autoencoder's loss, for one that keeps images as they are but for its own noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from guided_distill.models.stable_diffusion.autoencoder import AutoencoderKL
from guided_distill.objectives.autoencoder import autoencoder_loss

KL_WEIGHT = 0.1


class Identity:
    """Latents are the pixels, and a deviation that the weights tell."""

    def bind(self, variables):
        self.log_variance = variables["params"]
        return self

    def encode(self, x):
        return x, jnp.full_like(x, self.log_variance)

    def decode(self, latents):
        return latents


@pytest.mark.parametrize("deviation", [0.1, 1.0, 2.0])
def test_loss_is_the_error_of_a_draw_and_the_divergence(deviation):
    x = jax.random.normal(jax.random.key(0), (2, 64, 64, 3))
    log_variance = 2.0 * np.log(deviation)
    keys = jax.random.split(jax.random.key(1), 2)
    found = autoencoder_loss(Identity(), log_variance, x, keys, kl_weight=KL_WEIGHT)
    # E|n| of unit noise is sqrt(2 / pi).
    np.testing.assert_allclose(found.aux["error"], deviation * np.sqrt(2 / np.pi), rtol=0.02)
    kl = 0.5 * (np.square(x).mean(axis=(1, 2, 3)) + deviation**2 - 1.0 - log_variance)
    np.testing.assert_allclose(found.aux["kl"], kl, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        found.per_example, found.aux["error"] + KL_WEIGHT * found.aux["kl"], rtol=1e-6
    )


def test_gradients_reach_every_weight():
    module = AutoencoderKL(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    shapes = jax.eval_shape(module.init, jax.random.key(1), x)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), shapes)

    def loss(params):
        return autoencoder_loss(
            module, params, x, jax.random.split(jax.random.key(2), 2), kl_weight=1e-3
        ).per_example.sum()

    gradient = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        # Attention adds the same to all scores through the keys' bias.
        assert np.abs(leaf).max() > 0 or "to_k" in jax.tree_util.keystr(path), path
