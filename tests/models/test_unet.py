"""The U-Net's options: remat computes the same function with less memory; patch_size is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from guided_distill.models.patches import from_patches, to_patches
from guided_distill.models.remat import KINDS
from guided_distill.models.unet import UNet

OPTIONS = {
    "width": 8,
    "channel_multipliers": (1,),
    "blocks_per_level": 1,
    "attention_resolutions": (4,),
    "head_width": 8,
    "embedding_width": 8,
    "num_classes": 3,
    "dropout": 0.3,
}
OTHERS = (jnp.array([-3.0, 2.0]), {"label": jnp.array([0, 3])})


def images(size):
    return jax.random.normal(jax.random.key(0), (2, size, size, 3))


def random_params(net, image):
    """Weights without zeros."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), image, *OTHERS))["params"]
    return jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), shapes)


def training_loss(remat):
    net = UNet(**OPTIONS, remat=remat)

    def loss(params):
        rngs = {"dropout": jax.random.key(1)}
        output = net.apply({"params": params}, images(4), *OTHERS, train=True, rngs=rngs)
        return jnp.square(output - 1.0).mean()

    return loss


@pytest.mark.parametrize("kind", ["products", "blocks"])
def test_remat_changes_neither_loss_nor_gradient(kind):
    params = random_params(UNet(**OPTIONS), images(4))
    (loss, gradient), (same_loss, same_gradient) = (
        jax.jit(jax.value_and_grad(training_loss(remat)))(params) for remat in ("none", kind)
    )
    np.testing.assert_allclose(same_loss, loss, rtol=1e-5)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5),
        same_gradient,
        gradient,
    )
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_remat_keeps_little_for_the_backward_pass():
    params = random_params(UNet(**OPTIONS), images(4))

    def kept(remat):
        """How many numbers the backward pass keeps besides the weights."""
        backward = jax.eval_shape(lambda p: jax.vjp(training_loss(remat), p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(backward)) - sum(
            leaf.size for leaf in jax.tree.leaves(params)
        )

    everything, products, inputs = map(kept, KINDS)
    assert inputs < 0.5 * products < 0.5 * everything * 0.7


def test_patches_are_channels_of_the_same_net():
    coarse, fine = UNet(**OPTIONS, patch_size=2), UNet(**OPTIONS)
    image = images(8)
    params = random_params(coarse, image)

    @jax.jit
    def both(params):
        expected = fine.apply({"params": params}, to_patches(image, 2), *OTHERS)
        return coarse.apply({"params": params}, image, *OTHERS), from_patches(expected, 2)

    found, expected = both(params)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.std() > 0.1
