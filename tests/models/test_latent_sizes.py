"""The published networks have as many weights and tensors as in diffusers and transformers."""

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

from guided_distill.models.dit import DiT
from guided_distill.models.stable_diffusion.autoencoder import AutoencoderKL, VQModel
from guided_distill.models.stable_diffusion.text_encoder import CLIPTextEncoder
from guided_distill.models.stable_diffusion.unet import UNet2DCondition

STABLE_DIFFUSION_2 = {
    "num_attention_heads": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
IMAGENET_LDM = {
    "block_out_channels": (192, 384, 576, 960),
    "cross_attention_levels": (1, 2, 3),
    "num_attention_heads": (1, 1, 1, 1),
    "cross_attention_dim": 512,
    "num_classes": 1000,
}
DENOISERS = {
    "sd1": (UNet2DCondition(), 4, "text", 859_520_964, 686),
    "sd1 with w": (UNet2DCondition(w_conditioned=True), 4, "text", 859_602_884, 687),
    "sd1 in-painting": (UNet2DCondition(), 4, "inpaint", 859_535_364, 686),
    "sd2": (UNet2DCondition(**STABLE_DIFFUSION_2), 4, "text", 865_910_724, 686),
    "sd2 in-painting": (
        UNet2DCondition(**STABLE_DIFFUSION_2),
        4,
        "inpaint",
        865_925_124,
        686,
    ),
    # The published model embeds labels in a network of its own.
    "imagenet ldm": (
        UNet2DCondition(**IMAGENET_LDM),
        3,
        "label",
        400_920_579 + 1001 * 512,
        688 + 1,
    ),
    # In the published model, every block has its own embeddings of time and label.
    "dit xl/2": (DiT(num_classes=1000), 4, "label", 749_826_464, 538),
}
OTHERS = {
    "kl f8": (AutoencoderKL(), (1, 64, 64, 3), 83_653_863, 248),
    "vq f4": (VQModel(), (1, 64, 64, 3), 55_322_782, 205),
    "vq f8": (
        VQModel(
            block_out_channels=(128, 256, 256, 512),
            latent_channels=4,
            num_vq_embeddings=16384,
            attention_levels=(3,),
        ),
        (1, 64, 64, 3),
        67_717_295,
        299,
    ),
    "clip l/14": (CLIPTextEncoder(), (1, 77), 123_060_480, 196),
    "clip h/14": (
        CLIPTextEncoder(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=23,
            num_attention_heads=16,
            hidden_act="gelu",
        ),
        (1, 77),
        340_387_840,
        372,
    ),
}


def size(module, *inputs):
    """The numbers of weights and of tensors, and the output's shape."""
    output, variables = jax.eval_shape(
        lambda *inputs: module.init_with_output(jax.random.key(0), *inputs), *inputs
    )
    leaves = flatten_dict(variables["params"]).values()
    return sum(leaf.size for leaf in leaves), len(leaves), output.shape


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("name", DENOISERS)
def test_denoiser(name):
    module, channels, conditioned_on, weights, tensors = DENOISERS[name]
    z = array(1, 32, 32, channels)
    condition = {"label": array(1, dtype=jnp.int32)}
    if conditioned_on != "label":
        condition = {"text": array(1, 77, module.cross_attention_dim)}
    if conditioned_on == "inpaint":
        condition["inpaint"] = array(1, 32, 32, 1 + channels)
    w = array(1) if module.w_conditioned else None
    assert size(module, z, array(1), condition, w) == (weights, tensors, z.shape)


@pytest.mark.parametrize("name", OTHERS)
def test_autoencoder_or_text_encoder(name):
    module, shape, weights, tensors = OTHERS[name]
    found = size(module, array(*shape, dtype=jnp.float32 if len(shape) == 4 else jnp.int32))
    output = shape if len(shape) == 4 else (*shape, module.hidden_size)
    assert found == (weights, tensors, output)
