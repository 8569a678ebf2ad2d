"""A denoiser's companions, a diffusers folder without it: the autoencoder and the text encoder, read."""

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.errors import FlaxError

from guided_distill.errors import UserError
from guided_distill.formats.config_keys import (
    a_list,
    divides,
    must,
    one_of,
    positive,
    whole_number,
    whole_numbers,
)
from guided_distill.formats.diffusers_folder import (
    DIFFUSERS_VERSION,
    MODEL_INDEX,
    TEXT_WEIGHTS,
    WEIGHTS,
    copy_folder,
    read_weights,
    weights_files,
)
from guided_distill.formats.json_files import read_json
from guided_distill.formats.torch_layout import canonical, to_tree
from guided_distill.models.registry import Params
from guided_distill.models.stable_diffusion.autoencoder import AutoencoderKL, VQModel
from guided_distill.models.stable_diffusion.text_encoder import ACTIVATIONS, CLIPTextEncoder
from guided_distill.storage import first_line, whole

COMPANIONS = "companions"
"""Their folder in a workdir."""

_VAE_MUST = {
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
    "lookup_from_codebook": False,
    "mid_block_add_attention": True,
    "norm_type": "group",
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}

# transformers' defaults for keys that a config leaves out.
CLIP_TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
}


def bring_companions(source: epath.Path, workdir: epath.Path) -> None:
    """Copy the companions of the run in `source`, if it has any, to a run that lacks them."""
    if (source / COMPANIONS / MODEL_INDEX).exists() and not (workdir / COMPANIONS).exists():
        with whole(workdir / COMPANIONS) as part:
            copy_folder(source / COMPANIONS, part)


def check_companions(source: epath.Path, folder: epath.Path) -> None:
    """Raises UserError unless `folder` has no companions, or those of the run in `source`."""
    theirs, ours = folder / COMPANIONS, source / COMPANIONS
    if theirs.exists() and not _same_autoencoder(theirs, ours):
        raise UserError(f"{theirs} belongs to another model: choose another folder for --out")


def _same_autoencoder(*companions: epath.Path) -> bool:
    one, other = (weights_files(folder / "vae") for folder in companions)
    return one.keys() == other.keys() and all(
        one[name].read_bytes() == other[name].read_bytes() for name in one
    )


def read_autoencoder(folder: epath.Path) -> tuple[AutoencoderKL | VQModel, Params]:
    """The autoencoder in a folder, most often `vae`, and its weights.

    Raises UserError, naming the key or the tensors, if it isn't one that is supported.
    """
    config, where = read_json(folder / "config.json"), folder / "config.json"
    kinds = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}
    one_of(config.get("_class_name"), kinds, "_class_name", where)
    for key, only in _VAE_MUST.items():
        must(config.get(key, only), only, key, where)
    latent_channels = whole_number(config.get("latent_channels", 4), "latent_channels", where)
    fields: dict[str, Any] = {
        "block_out_channels": whole_numbers(
            config.get("block_out_channels"), "block_out_channels", where
        ),
        "latent_channels": latent_channels,
        "layers_per_block": whole_number(
            config.get("layers_per_block", 1), "layers_per_block", where
        ),
        "norm_num_groups": whole_number(
            config.get("norm_num_groups", 32), "norm_num_groups", where
        ),
        "image_channels": whole_number(config.get("in_channels", 3), "in_channels", where),
        "attention_levels": _attention_levels(config, where),
        "scaling_factor": positive(config.get("scaling_factor", 0.18215), "scaling_factor", where),
    }
    for width in fields["block_out_channels"]:
        divides(fields["norm_num_groups"], width, "norm_num_groups", "block_out_channels", where)
    if config["_class_name"] == "VQModel":
        must(config.get("vq_embed_dim") or latent_channels, latent_channels, "vq_embed_dim", where)
        fields["num_vq_embeddings"] = whole_number(
            config.get("num_vq_embeddings", 256), "num_vq_embeddings", where
        )
    module = kinds[config["_class_name"]](**fields)
    image = (1, *(2 ** len(fields["block_out_channels"]),) * 2, fields["image_channels"])
    return module, _weights(module, jax.ShapeDtypeStruct(image, jnp.float32), folder, WEIGHTS)


def autoencoder_config(module: AutoencoderKL, *, sample_size: int) -> dict[str, Any]:
    """The config.json of an autoencoder of sample_size squares; `read_autoencoder` reads it."""
    levels = range(len(module.block_out_channels))
    attention = ["Attn" if level in module.attention_levels else "" for level in levels]
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "block_out_channels": list(module.block_out_channels),
        "down_block_types": [f"{each}DownEncoderBlock2D" for each in attention],
        "in_channels": module.image_channels,
        "latent_channels": module.latent_channels,
        "layers_per_block": module.layers_per_block,
        "norm_num_groups": module.norm_num_groups,
        "out_channels": module.image_channels,
        "sample_size": sample_size,
        "scaling_factor": module.scaling_factor,
        "up_block_types": [f"{each}UpDecoderBlock2D" for each in reversed(attention)],
    }


def read_text_encoder(folder: epath.Path) -> tuple[CLIPTextEncoder, Params]:
    """The CLIP text encoder in a folder, most often `text_encoder`, and its weights.

    Raises UserError, naming the key or the tensors, if it isn't one that is supported.
    """
    config, where = read_json(folder / "config.json"), folder / "config.json"
    one_of(config.get("model_type"), ("clip_text_model",), "model_type", where)
    must(config.get("layer_norm_eps", 1e-5), 1e-5, "layer_norm_eps", where)
    activation = config.get("hidden_act", "quick_gelu")
    one_of(activation, ACTIVATIONS, "hidden_act", where)
    numbers: dict[str, Any] = {
        key: whole_number(config.get(key, default), key, where)
        for key, default in CLIP_TEXT_DEFAULTS.items()
    }
    module = CLIPTextEncoder(hidden_act=activation, **numbers)
    heads = numbers["num_attention_heads"]
    divides(heads, numbers["hidden_size"], "num_attention_heads", "hidden_size", where)
    tokens = jax.ShapeDtypeStruct((1, numbers["max_position_embeddings"]), jnp.int32)
    return module, _weights(module, tokens, folder, TEXT_WEIGHTS)


def _attention_levels(config: Mapping[str, Any], where: epath.Path) -> tuple[int, ...]:
    levels = []
    for key, kind, ways in (
        ("down_block_types", "DownEncoderBlock2D", 1),
        ("up_block_types", "UpDecoderBlock2D", -1),
    ):
        types = a_list(config.get(key, [kind]), key, where)[::ways]
        for each in types:
            one_of(each, (kind, f"Attn{kind}"), key, where)
        levels.append(tuple(i for i, each in enumerate(types) if each.startswith("Attn")))
    if levels[0] != levels[1]:
        raise UserError(f"{where}: up_block_types must have attention where down_block_types have")
    return levels[0]


def _weights(
    module: nn.Module, example: jax.ShapeDtypeStruct, folder: epath.Path, stem: str
) -> Params:
    init = functools.partial(module.init, jax.random.key(0))
    template = shapes_of(
        lambda: init(jnp.zeros(example.shape, example.dtype))["params"], folder / "config.json"
    )
    return to_tree(canonical(read_weights(folder, stem)), template, source=folder)


def shapes_of(init: Callable[[], Any], where: epath.Path) -> Any:
    """Shapes of a network's weights. Raises UserError, naming `where`, if it can't be built."""
    try:
        return jax.eval_shape(init)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError, FlaxError) as error:
        raise UserError(
            f"{where} is of a network that can't be built ({first_line(error)}): is it the model's own?"
        ) from error


def fingerprint(settings: object, params: Any) -> str:
    """The first 16 hex digits of a SHA-256: of a network's settings, and its weights in their order."""
    digest = hashlib.sha256(repr(settings).encode())
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]
