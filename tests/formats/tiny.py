"""Small models with random weights, as diffusers keeps them: numpy and configs written by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from guided_distill.formats.diffusers_folder import TEXT_WEIGHTS, WEIGHTS, write_component
from guided_distill.formats.torch_layout import to_tensors
from guided_distill.models.dit import DiT
from guided_distill.models.stable_diffusion.autoencoder import AutoencoderKL, VQModel
from guided_distill.models.stable_diffusion.text_encoder import CLIPTextEncoder
from guided_distill.models.stable_diffusion.unet import UNet2DCondition
from guided_distill.runs.trained import Description, load_finished
from guided_distill.training.checkpoints import StageCheckpoints

SIZE, LATENTS, LENGTH, WIDTH = 8, 4, 7, 64
VOCABULARY = 2 * 256 + 2
"""Every byte, alone and at a word's end, and two marks."""

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
DIT = {
    "_class_name": "DiTTransformer2DModel",
    "_diffusers_version": "0.42.1",
    "sample_size": SIZE,
    "in_channels": LATENTS,
    "out_channels": 2 * LATENTS,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 3,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
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
    "vocab_size": VOCABULARY,
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
    """Weights for a module, none of them zero, which keep the size of what they are given."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs)["params"])
    return random_like(shapes, seed=seed)


def random_like(shapes, *, seed):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        match path[-1].key:
            case "kernel":
                return noise * np.float32(np.prod(leaf.shape[:-1]) ** -0.5)
            case "scale":
                return 1 + np.float32(0.1) * noise
        return np.float32(0.1) * noise

    return jax.tree_util.tree_map_with_path(draw, shapes)


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
    condition = {"text": jnp.zeros((1, LENGTH, width))}
    if num_classes:
        condition = {"label": jnp.zeros((1,), jnp.int32)}
    if inpaint:
        condition["inpaint"] = jnp.zeros((1, SIZE, SIZE, 1 + LATENTS))
    return random_tree(module, jnp.zeros((1, SIZE, SIZE, LATENTS)), one, condition, seed=1)


def dit():
    module = DiT(3, num_layers=2, num_attention_heads=2, attention_head_dim=8)
    label = {"label": jnp.zeros((1,), jnp.int32)}
    return random_tree(module, jnp.zeros((1, SIZE, SIZE, LATENTS)), jnp.zeros((1,)), label, seed=5)


def vae():
    module = AutoencoderKL(block_out_channels=(32, 32, 64))
    return random_tree(module, jnp.zeros((1, 8, 8, 3)), seed=2)


def vq():
    module = VQModel(block_out_channels=(32, 32, 64), latent_channels=LATENTS, num_vq_embeddings=9)
    return random_tree(module, jnp.zeros((1, 8, 8, 3)), seed=3)


def text_encoder(layers=2):
    module = CLIPTextEncoder(VOCABULARY, WIDTH, 128, layers, 1, LENGTH)
    return random_tree(module, jnp.zeros((1, LENGTH), jnp.int32), seed=4)


def write_json(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def write_tokenizer(folder):
    """CLIP's kind of tokenizer, which knows no pair of letters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    marks = ["<|startoftext|>", "<|endoftext|>"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *marks]
    write_json(folder / "vocab.json", {word: index for index, word in enumerate(words)})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = dict(zip(("bos_token", "eos_token"), marks, strict=True))
    special |= dict.fromkeys(("unk_token", "pad_token"), marks[1])
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, **special},
    )


def write_pipeline(folder, *, inpaint=False, num_classes=0):
    """A Stable Diffusion folder, or with num_classes one of labels, whose table lies in its own."""
    folder = epath.Path(folder)
    config = {**UNET, "in_channels": 2 * LATENTS + 1} if inpaint else UNET
    index = {**INDEX, "_class_name": f"StableDiffusion{'Inpaint' if inpaint else ''}Pipeline"}
    tensors = to_tensors(unet(inpaint=inpaint, num_classes=num_classes))
    if num_classes:
        index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
        table = {"embedding.weight": tensors.pop("class_embedder.weight")}
        write_component(folder / "class_embedder", {}, table, WEIGHTS)
    else:
        write_component(folder / "text_encoder", TEXT, to_tensors(text_encoder()), TEXT_WEIGHTS)
        write_tokenizer(folder / "tokenizer")
    write_component(folder / "unet", config, tensors, WEIGHTS)
    write_component(folder / "vae", VAE, to_tensors(vae()), WEIGHTS)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", index)
    return folder


def write_dit(folder):
    """A DiTPipeline's folder."""
    folder = epath.Path(folder)
    write_component(folder / "transformer", DIT, to_tensors(dit()), WEIGHTS)
    write_component(folder / "vae", VAE, to_tensors(vae()), WEIGHTS)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": "0.42.1",
        "id2label": {"0": "cat"},
        "scheduler": ["diffusers", "PNDMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)
    return folder


def add_student(workdir, *, parameterization=None, **changes):
    """A student beside a run's teacher, with random weights, as a training would leave it."""
    values = load_finished(workdir / "teacher").description.to_json()
    values |= {"w_min": 1.0, "w_max": 13.0, "stage": "halving"} | changes
    if parameterization:
        values["experiment"]["model"]["parameterization"] = parameterization
    about = Description.from_json(values)
    shapes = jax.eval_shape(about.network().init, jax.random.key(0))
    name = f"{about.stage}_{about.sampler}_{about.num_steps}_{parameterization}"
    with StageCheckpoints(workdir / name) as checkpoints:
        params = random_like(shapes, seed=7)
        checkpoints.save_result(about.total_steps, params, about=about.to_json())
        checkpoints.wait()
    return name
