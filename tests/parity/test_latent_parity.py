"""Networks of latent diffusion against diffusers' and transformers': see latent_golden.py."""

import jax
import jax.numpy as jnp
import latent_cases as cases
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from guided_distill.models.dit import DiT
from guided_distill.models.stable_diffusion.autoencoder import AutoencoderKL, VQModel
from guided_distill.models.stable_diffusion.text_encoder import CLIPTextEncoder
from guided_distill.models.stable_diffusion.unet import UNet2DCondition

AUTOENCODER = {
    "block_out_channels": cases.CHANNELS,
    "layers_per_block": 1,
    "norm_num_groups": cases.GROUPS,
}


@pytest.fixture(scope="module")
def golden():
    with np.load(cases.GOLDEN) as file:
        return dict(file)


def weights(module, *inputs):
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs)["params"])
    return unflatten_dict(
        {
            path: cases.weight("/".join(path), leaf.shape)
            for path, leaf in flatten_dict(shapes).items()
        }
    )


def run(module, params, *inputs, method=None):
    apply = jax.jit(
        lambda params, *inputs: module.apply({"params": params}, *inputs, method=method)
    )
    return apply(params, *inputs)


def assert_meets(found, expected):
    assert np.abs(cases.probe(np.asarray(found)) - expected).max() < 5e-5 * expected.std()


@pytest.mark.parametrize("name", cases.UNETS)
def test_unet(golden, name):
    case = cases.UNETS[name]
    net = UNet2DCondition(
        block_out_channels=cases.CHANNELS,
        layers_per_block=1,
        cross_attention_dim=cases.CONTEXT,
        norm_num_groups=cases.GROUPS,
        w_embedding_width=cases.W_WIDTH,
        **case,
    )
    z, condition = cases.Z, {"text": cases.TEXT}
    if name == "imagenet":
        z, condition = cases.EVEN_Z[..., :3], {"label": cases.LABEL}
    if name == "inpaint":
        condition["inpaint"] = cases.INPAINT
    inputs = (z, cases.TIME, condition, cases.W if net.w_conditioned else None)
    found = run(net, weights(net, *inputs), *inputs)
    assert found.shape == z.shape
    assert_meets(found, golden[name])


def test_dit(golden):
    net = DiT(num_classes=cases.CLASSES, **cases.DIT)
    inputs = (cases.EVEN_Z, cases.TIME, {"label": cases.LABEL})
    found = run(net, weights(net, *inputs), *inputs)
    assert found.shape == cases.EVEN_Z.shape
    assert_meets(found, golden["dit"])


def test_autoencoder_kl(golden):
    net = AutoencoderKL(**AUTOENCODER)
    params = weights(net, cases.IMAGE)
    mean, log_variance = run(net, params, cases.IMAGE, method="encode")
    assert_meets(mean, golden["kl mean"])
    assert_meets(log_variance, golden["kl log variance"])
    assert_meets(run(net, params, cases.EVEN_Z, method="decode"), golden["kl decoded"])


def test_vq_model(golden):
    net = VQModel(**AUTOENCODER, attention_levels=(1,), num_vq_embeddings=cases.CODES)
    params = weights(net, cases.IMAGE)
    assert_meets(run(net, params, cases.IMAGE, method="encode"), golden["vq encoded"])
    decoded = run(net, params, cases.EVEN_Z[..., :3], method="decode")
    assert_meets(decoded, golden["vq decoded"])


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_text_encoder(golden, activation):
    net = CLIPTextEncoder(**cases.CLIP, hidden_act=activation)
    tokens = jnp.asarray(cases.TOKENS)
    assert_meets(run(net, weights(net, tokens), tokens), golden[activation])
