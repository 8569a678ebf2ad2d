"""Small models with random weights, as diffusers keeps them: numpy and configs written by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from guided_distill.interop.diffusers_folder import TEXT_WEIGHTS, WEIGHTS, write_component
from guided_distill.interop.torch_layout import to_tensors
from guided_distill.models.stable_diffusion.autoencoder import AutoencoderKL, VQModel
from guided_distill.models.stable_diffusion.text_encoder import CLIPTextEncoder
from guided_distill.models.stable_diffusion.unet import UNet2DCondition

SIZE, LATENTS, LENGTH, WIDTH = 8, 4, 7, 64

UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.42.1",
    "sample_size": SIZE,
    "in_channels": LATENTS,
    "out_channels": LATENTS,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "use_linear_projection": False,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.42.1",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [32, 32, 64],
    "layers_per_block": 2,
    "latent_channels": LATENTS,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "scaling_factor": 0.18215,
}
TEXT = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 20,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "max_position_embeddings": LENGTH,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.42.1",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def random_tree(module, *inputs, seed=0):
    """Weights for a module, none of them zero."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs)["params"])
    return jax.tree.map(
        lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32) + 0.05, shapes
    )


def unet(*, inpaint=False, num_classes=0, width=WIDTH, linear=False):
    module = UNet2DCondition(
        block_out_channels=(32, 64),
        cross_attention_levels=(0,),
        num_attention_heads=(8, 8),
        layers_per_block=1,
        cross_attention_dim=width,
        use_linear_projection=linear,
        num_classes=num_classes,
    )
    one = jnp.zeros((1,))
    condition = {"label": jnp.zeros((1,), jnp.int32), "text": jnp.zeros((1, LENGTH, width))}
    if inpaint:
        condition["inpaint"] = jnp.zeros((1, SIZE, SIZE, 1 + LATENTS))
    return random_tree(module, jnp.zeros((1, SIZE, SIZE, LATENTS)), one, condition, seed=1)


def vae():
    module = AutoencoderKL(block_out_channels=(32, 32, 64))
    return random_tree(module, jnp.zeros((1, 8, 8, 3)), seed=2)


def vq():
    module = VQModel(block_out_channels=(32, 32, 64), latent_channels=LATENTS, num_vq_embeddings=9)
    return random_tree(module, jnp.zeros((1, 8, 8, 3)), seed=3)


def text_encoder():
    module = CLIPTextEncoder(20, WIDTH, 128, 2, 1, LENGTH)
    return random_tree(module, jnp.zeros((1, LENGTH), jnp.int32), seed=4)


def write_json(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def write_pipeline(folder, *, inpaint=False, scheduler=SCHEDULER):
    """A Stable Diffusion folder; its tokenizer is a file that nothing here reads."""
    folder = epath.Path(folder)
    config = {**UNET, "in_channels": 2 * LATENTS + 1} if inpaint else UNET
    name = f"StableDiffusion{'Inpaint' if inpaint else ''}Pipeline"
    write_component(folder / "unet", config, to_tensors(unet(inpaint=inpaint)), WEIGHTS)
    write_component(folder / "vae", VAE, to_tensors(vae()), WEIGHTS)
    write_component(folder / "text_encoder", TEXT, to_tensors(text_encoder()), TEXT_WEIGHTS)
    write_json(folder / "tokenizer" / "vocab.json", {"a": 0})
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", {**INDEX, "_class_name": name})
    return folder
