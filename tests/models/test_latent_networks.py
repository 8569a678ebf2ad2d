"""Properties of the latent diffusion networks, beside their parity with diffusers (tests/parity)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from guided_distill.models.dit import DiT
from guided_distill.models.stable_diffusion.autoencoder import AutoencoderKL
from guided_distill.models.stable_diffusion.unet import UNet2DCondition

NETWORKS = {
    "unet": functools.partial(
        UNet2DCondition,
        block_out_channels=(8,),
        cross_attention_levels=(0,),
        num_attention_heads=(2,),
        layers_per_block=1,
        cross_attention_dim=6,
        norm_num_groups=2,
        num_classes=3,
    ),
    "dit": functools.partial(
        DiT, num_classes=3, num_layers=4, num_attention_heads=2, attention_head_dim=4
    ),
}
TIME = jnp.array([3.0, 500.0])
CONDITION = {"label": jnp.array([1, 3])}
W = jnp.array([0.5, 4.0])


def latents(size=4):
    return jax.random.normal(jax.random.key(0), (2, size, size, 4))


def random_params(module, *inputs):
    """Weights without zeros."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))["params"]
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), shapes
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_w_is_given_exactly_if_the_network_is_conditioned_on_it(name):
    inputs = (latents(), TIME, CONDITION)
    for w_conditioned, w in ((True, None), (False, W)):
        module = NETWORKS[name](w_conditioned=w_conditioned)
        with pytest.raises(ValueError, match="w_conditioned"):
            module.init(jax.random.key(0), *inputs, w)


@pytest.mark.parametrize("name", NETWORKS)
def test_dropout_applies_in_training_only(name):
    inputs = (latents(), TIME, CONDITION)
    plain, dropping = NETWORKS[name](), NETWORKS[name](dropout=0.3)
    params = random_params(plain, *inputs)

    @jax.jit
    def run(params, key):
        apply = functools.partial(dropping.apply, {"params": params}, *inputs)
        dropped = apply(train=True, rngs={"dropout": key})
        return plain.apply({"params": params}, *inputs), apply(), dropped

    plain_output, output, dropped = run(params, jax.random.key(0))
    np.testing.assert_array_equal(output, plain_output)
    assert np.abs(dropped - output).max() > 1e-2
    assert np.abs(run(params, jax.random.key(1))[2] - dropped).max() > 1e-2


@pytest.mark.parametrize("name", NETWORKS)
def test_remat_has_the_same_weights_and_keeps_little_for_the_backward_pass(name):
    inputs = (latents(), TIME, CONDITION)

    def shapes(remat):
        """The weights' shapes, and how many other numbers the backward pass keeps."""
        net = NETWORKS[name](remat=remat)

        def apply(params):
            return net.apply({"params": params}, *inputs)

        params = jax.eval_shape(lambda: net.init(jax.random.key(0), *inputs))["params"]
        backward = jax.eval_shape(lambda params: jax.vjp(apply, params)[1], params)
        kept, weights = (
            sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (backward, params)
        )
        return params, kept - weights

    params, kept = shapes(remat="none")
    same_params, kept_by_remat = shapes(remat="blocks")
    assert same_params == params
    assert kept_by_remat < 0.5 * kept


def test_latents_are_drawn_then_scaled():
    net = AutoencoderKL(
        block_out_channels=(8,), layers_per_block=1, norm_num_groups=2, scaling_factor=0.5
    )
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    params = random_params(net, images)
    # Log variances far below and far above the range that they are clipped to.
    sure, unsure = jnp.array([-99.0, -99.0]), jnp.array([99.0, 99.0])
    params["quant_conv"]["bias"] = jnp.concatenate([jnp.zeros(4), sure, unsure])

    @jax.jit
    def run(params):
        bound = net.bind({"params": params})
        mean, log_variance = bound.encode(images)
        middle, drawn = bound.to_latents(images), bound.to_latents(images, jax.random.key(1))
        return mean, log_variance, middle, drawn, bound.decode(mean), bound.to_images(middle)

    mean, log_variance, middle, drawn, decoded, images_again = run(params)
    np.testing.assert_array_equal(log_variance[..., :2], -30.0)
    np.testing.assert_array_equal(log_variance[..., 2:], 20.0)
    np.testing.assert_allclose(middle, 0.5 * mean, rtol=1e-6)
    np.testing.assert_allclose(drawn[..., :2], middle[..., :2], atol=1e-6)
    spread = (drawn - middle)[..., 2:] / (0.5 * np.exp(10.0))
    np.testing.assert_allclose(np.std(spread), 1.0, rtol=0.05)
    np.testing.assert_allclose(images_again, decoded, atol=1e-5)
