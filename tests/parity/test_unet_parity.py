"""Our U-Net against diffusers' (see unet_golden.py): the same weights, the same outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unet_cases as cases
from flax.traverse_util import flatten_dict, unflatten_dict

from guided_distill.models.embeddings import Conditioning
from guided_distill.models.unet import AttentionBlock, ResidualBlock, UNet


@pytest.fixture(scope="module")
def golden():
    with np.load(cases.GOLDEN) as file:
        return dict(file)


def output(module, name, *inputs):
    """What the module makes of the inputs with the weights of that name."""

    def shapes():
        return module.init(jax.random.key(0), *inputs)["params"]

    params = {
        path: jnp.asarray(cases.weight("/".join((name, *path)), *leaf.shape))
        for path, leaf in flatten_dict(jax.eval_shape(shapes)).items()
    }
    found = jax.jit(lambda params: module.apply({"params": params}, *inputs))
    return np.asarray(found(unflatten_dict(params)))


def assert_meets(found, expected):
    assert np.abs(cases.probe(found) - expected).max() < 1e-4 * expected.std()


def log_snr():
    return jnp.asarray(-2 * np.log(np.tan(0.5 * np.pi * cases.TIME)))


@pytest.mark.parametrize("name", cases.RESIDUAL_BLOCKS)
def test_residual_block(golden, name):
    channels, resampling = cases.RESIDUAL_BLOCKS[name]
    block = ResidualBlock(channels, 0.0, jnp.float32, resampling)
    found = output(block, name, cases.FEATURES, cases.CONDITION, False)
    assert_meets(found, golden[name])


def test_attention_block(golden):
    block = AttentionBlock(cases.HEAD_WIDTH, jnp.float32)
    assert_meets(output(block, "attention", cases.FEATURES), golden["attention"])


def test_conditioning(golden):
    module = Conditioning(
        cases.EMBEDDING,
        cases.CLASSES,
        True,
        sinusoid_width=cases.WIDTH,
        w_embedding="fourier",
        time_scale=1000.0,
    )
    found = output(module, "conditioning", log_snr(), cases.LABEL, cases.W)
    assert_meets(found, golden["conditioning"])


def test_whole_net(golden):
    net = UNet(
        width=cases.WIDTH,
        channel_multipliers=(1, 2),
        blocks_per_level=1,
        attention_resolutions=(4,),
        head_width=cases.HEAD_WIDTH,
        embedding_width=cases.EMBEDDING,
        num_classes=cases.CLASSES,
        w_conditioned=True,
    )
    condition = {"label": cases.LABEL}
    found = output(net, "net", cases.IMAGE, log_snr(), condition, cases.W)
    assert found.shape == cases.IMAGE.shape
    assert_meets(found, golden["net"])
