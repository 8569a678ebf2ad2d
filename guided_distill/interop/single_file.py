"""One .safetensors file in the layout of CompVis' latent diffusion, read as a diffusers pipeline.

Stable Diffusion 1.x and 2.x, their in-painting kin, and the class-conditional models of "cin256". Such a
file has no config: widths and depths are told by its shapes, the rest by which conditioner it holds.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from guided_distill.errors import UserError
from guided_distill.interop.compvis_names import open_clip_name, unet_name, vae_name
from guided_distill.layouts.diffusers_folder import (
    CLASS_EMBEDDER,
    DIFFUSERS_VERSION,
    MODEL_INDEX,
    SCHEDULER_CONFIG,
    TEXT_WEIGHTS,
    WEIGHTS,
    copy_folder,
    read_tensors,
    write_component,
    write_json,
)
from guided_distill.layouts.torch_layout import Tensors

_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_CLIP = "cond_stage_model.transformer."
_OPEN_CLIP = "cond_stage_model.model."
_CLASSES = "cond_stage_model.embedding."

# Averages of the weights, which CompVis' own scripts don't sample with either; the noise schedule; what
# the autoencoder was trained with; the parts of CLIP that follow after the text's encoding.
_LEFT_OUT = re.compile(
    r"model_ema\..*|(?!.*\.).*|first_stage_model\.(loss|model_ema)\..*"
    r"|cond_stage_model\.model\.(text_projection|logit_scale|attn_mask)"
)

_SCALED_LINEAR = {"stable": (0.00085, 0.012), "classes": (0.0015, 0.0195)}


@dataclass(frozen=True)
class Component:
    """A config.json and the tensors that belong to it, in diffusers' or transformers' names."""

    config: Mapping[str, Any]
    tensors: Tensors


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds. text_encoder or class_embedder: its conditioner; the other one is None."""

    unet: Component
    vae: Component
    text_encoder: Component | None
    class_embedder: Component | None
    scheduler: Mapping[str, Any]


def read_single_file(path: epath.Path, *, prediction_type: str | None) -> Checkpoint:
    """Read a file's components.

    prediction_type: "epsilon" or "v_prediction", which nothing in a file tells; None for a model of the
    first version or of classes, all of which predict epsilon. Raises UserError for any other kind of
    file, for a tensor that belongs nowhere, and where the prediction type is needed and not given.
    """
    tensors = read_tensors(path, lambda name: name == "betas" or not _LEFT_OUT.fullmatch(name))
    betas = tensors.pop("betas", None)
    parts = {
        prefix: {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        for prefix in (_UNET, _VAE, _CLIP, _OPEN_CLIP, _CLASSES)
    }
    conditioners = [prefix for prefix in (_CLIP, _OPEN_CLIP, _CLASSES) if parts[prefix]]
    if not parts[_UNET] or not parts[_VAE] or len(conditioners) != 1:
        raise UserError(
            f"{path} is not a checkpoint of Stable Diffusion 1 or 2 or of a class-conditional latent "
            f"diffusion model: import a diffusers folder of the model instead"
        )
    known = sum(len(part) for part in parts.values())
    if known != len(tensors):
        strange = sorted(name for name in tensors if not name.startswith(tuple(parts)))
        raise UserError(
            f"{path} holds tensors that belong to no part of the model, such as {strange[0]}: convert "
            f"it to a diffusers folder first"
        )
    conditioner = conditioners[0]
    if prediction_type is None and conditioner == _OPEN_CLIP:
        raise UserError(
            f"{path} is a Stable Diffusion 2, which predicts epsilon (the base models) or v, and the "
            f"file doesn't say which: add --prediction_type epsilon or --prediction_type v_prediction"
        )
    scheduler = _scheduler(conditioner, prediction_type or "epsilon")
    if betas is not None:
        _check_betas(path, betas, scheduler)
    vae = _vae(parts[_VAE], path)
    text = {_CLIP: _clip, _OPEN_CLIP: _open_clip}.get(conditioner)
    return Checkpoint(
        unet=_unet(parts[_UNET], conditioner, scheduler["prediction_type"], path),
        vae=vae,
        text_encoder=text(parts[conditioner], path) if text else None,
        class_embedder=None if text else _class_embedder(parts[_CLASSES]),
        scheduler=scheduler,
    )


def write_folder(checkpoint: Checkpoint, folder: epath.Path, tokenizer: epath.Path | None) -> None:
    """Write a checkpoint as a diffusers folder. tokenizer: a folder to copy; None for a model of classes.

    A class embedder, which no pipeline knows, gets a folder of its own.
    """
    write_component(folder / "unet", checkpoint.unet.config, checkpoint.unet.tensors, WEIGHTS)
    write_component(folder / "vae", checkpoint.vae.config, checkpoint.vae.tensors, WEIGHTS)
    write_json(folder / "scheduler" / SCHEDULER_CONFIG, checkpoint.scheduler)
    if embedder := checkpoint.class_embedder:
        write_component(folder / CLASS_EMBEDDER, embedder.config, embedder.tensors, WEIGHTS)
    if encoder := checkpoint.text_encoder:
        write_component(folder / "text_encoder", encoder.config, encoder.tensors, TEXT_WEIGHTS)
    if tokenizer is not None:
        copy_folder(tokenizer, folder / "tokenizer")
    write_json(folder / MODEL_INDEX, _model_index(checkpoint))


def _model_index(checkpoint: Checkpoint) -> dict[str, Any]:
    unet = checkpoint.unet.config
    inpaint = unet["in_channels"] != unet["out_channels"]
    nothing = [None, None]
    return {
        "_class_name": f"StableDiffusion{'Inpaint' if inpaint else ''}Pipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": nothing,
        "requires_safety_checker": False,
        "safety_checker": nothing,
        "scheduler": ["diffusers", checkpoint.scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"] if checkpoint.text_encoder else nothing,
        "tokenizer": ["transformers", "CLIPTokenizer"] if checkpoint.text_encoder else nothing,
        "unet": ["diffusers", unet["_class_name"]],
        "vae": ["diffusers", checkpoint.vae.config["_class_name"]],
    }


def _scheduler(conditioner: str, prediction_type: str) -> dict[str, Any]:
    start, end = _SCALED_LINEAR["classes" if conditioner == _CLASSES else "stable"]
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": 1000,
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": prediction_type,
    }


def _check_betas(path: epath.Path, betas: np.ndarray, scheduler: Mapping[str, Any]) -> None:
    roots = np.linspace(
        scheduler["beta_start"] ** 0.5,
        scheduler["beta_end"] ** 0.5,
        scheduler["num_train_timesteps"],
    )
    if betas.shape != roots.shape or not np.allclose(betas, roots**2, rtol=1e-3, atol=0):
        raise UserError(
            f"{path} was trained with other betas than its kind of model has: convert it to a diffusers "
            f"folder with the scheduler_config.json that it needs"
        )


def _renamed(
    tensors: Tensors, rename: Callable[[str], str | None], prefix: str, path: epath.Path
) -> dict[str, np.ndarray]:
    renamed = {}
    for name, tensor in tensors.items():
        new = rename(name)
        if new is None:
            raise UserError(
                f"{path} holds {prefix}{name}, which no supported model has: import a diffusers folder "
                f"of it instead"
            )
        renamed[new] = tensor
    return renamed


def _count(tensors: Tensors, pattern: str) -> int:
    """How many different numbers stand in the pattern's place, over all names."""
    found = re.compile(pattern)
    return len({match[1] for name in tensors if (match := found.match(name))})


def _need(tensors: Tensors, name: str, path: epath.Path) -> np.ndarray:
    if name not in tensors:
        raise UserError(f"{path} lacks the tensor {name}: is the file whole?")
    return tensors[name]


def _unet(tensors: Tensors, conditioner: str, prediction_type: str, path: epath.Path) -> Component:
    downsamplers = sorted(
        int(match[1])
        for name in tensors
        if (match := re.fullmatch(r"input_blocks\.(\d+)\.0\.op\.weight", name))
    )
    if not downsamplers:
        raise UserError(f"{path} has a U-Net of one resolution only, which isn't supported")
    layers = downsamplers[0] - 1
    renamed = _renamed(tensors, lambda name: unet_name(name, layers_per_block=layers), _UNET, path)
    levels = range(len(downsamplers) + 1)
    widths = [
        len(_need(renamed, f"down_blocks.{level}.resnets.0.conv1.bias", path)) for level in levels
    ]
    attends = [
        any(name.startswith(f"down_blocks.{i}.attentions.") for name in renamed) for i in levels
    ]
    middle = "mid_block.attentions.0"
    inputs = _need(renamed, "conv_in.weight", path).shape[1]
    config = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "sample_size": _sample_size(conditioner, inputs, prediction_type),
        "in_channels": inputs,
        "out_channels": len(_need(renamed, "conv_out.bias", path)),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if each else "DownBlock2D" for each in attends],
        "up_block_types": [
            "CrossAttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attends)
        ],
        "cross_attention_dim": _need(
            renamed, f"{middle}.transformer_blocks.0.attn2.to_k.weight", path
        ).shape[1],
        "attention_head_dim": _heads(conditioner, widths, inputs),
        "use_linear_projection": _need(renamed, f"{middle}.proj_in.weight", path).ndim == 2,
    }
    return Component(config, renamed)


def _sample_size(conditioner: str, channels: int, prediction_type: str) -> int:
    """Of the released models: 512 pixels, 768 where Stable Diffusion 2 predicts v, 256 for classes."""
    if conditioner == _CLASSES:
        return 64 if channels == 3 else 32
    return 96 if conditioner == _OPEN_CLIP and prediction_type == "v_prediction" else 64


def _heads(conditioner: str, widths: list[int], channels: int) -> int | list[int]:
    """Number of attention heads, which diffusers' attention_head_dim is for a U-Net.

    Shapes don't tell: the first version has 8 heads, the second has heads of 64 channels; the
    class-conditional models have one head (3 latent channels) or heads of 32 channels (4).
    """
    if conditioner == _CLIP:
        return 8
    if conditioner == _OPEN_CLIP:
        return [max(1, width // 64) for width in widths]
    return 1 if channels == 3 else [width // 32 for width in widths]


def _vae(tensors: Tensors, path: epath.Path) -> Component:
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    renamed = {
        # Attention's projections are matrices there and 1x1 convolutions here.
        name: tensor[:, :, 0, 0] if ".attentions." in name and tensor.ndim == 4 else tensor
        for name, tensor in _renamed(
            tensors, lambda name: vae_name(name, levels=levels), _VAE, path
        ).items()
    }
    attends = [
        any(name.startswith(f"encoder.down_blocks.{level}.attentions.") for name in renamed)
        for level in range(levels)
    ]
    config = {
        "_diffusers_version": DIFFUSERS_VERSION,
        "in_channels": _need(renamed, "encoder.conv_in.weight", path).shape[1],
        "out_channels": len(_need(renamed, "decoder.conv_out.bias", path)),
        "block_out_channels": [
            len(_need(renamed, f"encoder.down_blocks.{level}.resnets.0.conv2.bias", path))
            for level in range(levels)
        ],
        "layers_per_block": _count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": _need(renamed, "post_quant_conv.weight", path).shape[0],
        "norm_num_groups": 32,
        "act_fn": "silu",
        "down_block_types": [
            "AttnDownEncoderBlock2D" if each else "DownEncoderBlock2D" for each in attends
        ],
        "up_block_types": [
            "AttnUpDecoderBlock2D" if each else "UpDecoderBlock2D" for each in reversed(attends)
        ],
    }
    if (codes := renamed.get("quantize.embedding.weight")) is None:
        return Component(
            {"_class_name": "AutoencoderKL", **config, "scaling_factor": 0.18215}, renamed
        )
    quantised = {"num_vq_embeddings": codes.shape[0], "vq_embed_dim": codes.shape[1]}
    return Component(
        {"_class_name": "VQModel", **config, **quantised, "scaling_factor": 1.0}, renamed
    )


def _clip(tensors: Tensors, path: epath.Path) -> Component:
    return _text_encoder(dict(tensors), "text_model.", "quick_gelu", path)


def _open_clip(tensors: Tensors, path: epath.Path) -> Component:
    """OpenCLIP's without its last block: Stable Diffusion 2 reads the one before."""
    last = _count(tensors, r"transformer\.resblocks\.(\d+)\.") - 1
    kept = {}
    for name, tensor in tensors.items():
        if name.startswith(f"transformer.resblocks.{last}."):
            continue
        if joint := re.fullmatch(
            r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name
        ):
            for letter, part in zip("qkv", np.split(tensor, 3), strict=True):
                kept[f"encoder.layers.{joint[1]}.self_attn.{letter}_proj.{joint[2]}"] = part
        else:
            kept |= _renamed({name: tensor}, open_clip_name, _OPEN_CLIP, path)
    return _text_encoder(kept, "", "gelu", path)


def _text_encoder(
    tensors: dict[str, np.ndarray], prefix: str, activation: str, path: epath.Path
) -> Component:
    vocabulary, width = _need(tensors, f"{prefix}embeddings.token_embedding.weight", path).shape
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": len(_need(tensors, f"{prefix}encoder.layers.0.mlp.fc1.bias", path)),
        "num_hidden_layers": _count(tensors, rf"{re.escape(prefix)}encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": len(
            _need(tensors, f"{prefix}embeddings.position_embedding.weight", path)
        ),
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
    }
    return Component(config, tensors)


def _class_embedder(tensors: Tensors) -> Component:
    return Component(
        {"_class_name": "ClassEmbedder"},
        {f"embedding.{name}": tensor for name, tensor in tensors.items()},
    )
