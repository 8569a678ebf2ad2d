"""An autoencoder in diffusers' layout: its config.json and its weights, read and written."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from guided_distill.errors import UserError
from guided_distill.formats.diffusers_folder import DIFFUSERS_VERSION, WEIGHTS, read_component
from guided_distill.formats.json_files import (
    a_list,
    divides,
    must,
    one_of,
    positive,
    read_json,
    whole_number,
    whole_numbers,
)
from guided_distill.models.registry import Params
from guided_distill.models.stable_diffusion.autoencoder import AutoencoderKL, VQModel

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


def read_autoencoder(folder: epath.Path) -> tuple[AutoencoderKL | VQModel, Params]:
    """The autoencoder in a folder, usually `vae`, and its weights.

    Raises UserError, naming the key or the tensors, if it isn't supported.
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
    return module, read_component(module, jax.ShapeDtypeStruct(image, jnp.float32), folder, WEIGHTS)


def autoencoder_config(module: AutoencoderKL, *, sample_size: int) -> dict[str, Any]:
    """The config.json of an autoencoder; `read_autoencoder` reads it. sample_size: pixels per side."""
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
        raise UserError(
            f"{where}: up_block_types must have attention at the levels where down_block_types have it"
        )
    return levels[0]
