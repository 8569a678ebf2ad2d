"""Reads one .safetensors file in the layout of CompVis' latent diffusion as a diffusers pipeline.

It reads Stable Diffusion 1.x and 2.x, their in-painting variants, and the class-conditional models
named "cin256". Such a file has no config: widths and depths follow from its shapes, and all else from
its kind of model.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from guided_distill.errors import UserError
from guided_distill.formats.compvis_names import open_clip_name, unet_name, vae_name
from guided_distill.formats.diffusers_folder import (
    CLASS_EMBEDDER,
    DIFFUSERS_VERSION,
    MODEL_INDEX,
    SCHEDULER_CONFIG,
    TEXT_WEIGHTS,
    WEIGHTS,
    copy_folder,
    read_weights_file,
    write_component,
)
from guided_distill.formats.json_files import write_json
from guided_distill.formats.safetensors_file import read_metadata
from guided_distill.formats.single_file_noise import BUFFERS, MARKERS, NoiseInFile, scheduler_of
from guided_distill.formats.torch_layout import Tensors

_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_CLIP = "cond_stage_model.transformer."
_OPEN_CLIP = "cond_stage_model.model."
_CLASSES = "cond_stage_model.embedding."
_CONDITIONERS = (_CLIP, _OPEN_CLIP, _CLASSES)

_AVERAGES = "model_ema."

# The autoencoder's discriminator and averages; the parts of CLIP after the text encoder.
_LEFT_OUT = re.compile(
    r"first_stage_model\.(loss|model_ema)\..*"
    r"|cond_stage_model\.model\.(text_projection|logit_scale|attn_mask)"
)


@dataclass(frozen=True)
class _Kind:
    """The properties that all published models of a kind share, but that no file states.

    betas: the first and the last. text_layers: the number of the text encoder's blocks that are used.
    """

    name: str
    betas: tuple[float, float]
    text_layers: int = 0
    activation: str = ""


_STABLE_1 = _Kind("Stable Diffusion 1", (0.00085, 0.012), 12, "quick_gelu")
# Stable Diffusion 2 uses the first 23 of OpenCLIP's 24 blocks.
_STABLE_2 = _Kind("Stable Diffusion 2", (0.00085, 0.012), 23, "gelu")
_OF_CLASSES = _Kind("a class-conditional latent diffusion model", (0.0015, 0.0195))


@dataclass(frozen=True)
class Component:
    """A config.json and its tensors, by the names of diffusers or transformers."""

    config: Mapping[str, Any]
    tensors: Tensors


@dataclass(frozen=True)
class Checkpoint:
    """The components of a file. Of text_encoder and class_embedder, one is None."""

    unet: Component
    vae: Component
    text_encoder: Component | None
    class_embedder: Component | None
    scheduler: Mapping[str, Any]


def read_single_file(
    path: epath.Path, *, prediction_type: str | None = None, averaged: bool = False
) -> Checkpoint:
    """Read the components of a file.

    prediction_type: "epsilon" or "v_prediction", which few files state; None for what the file states, or
    epsilon for a kind of model that always predicts it. averaged: use the U-Net's EMA weights,
    `model_ema.*`. Raises UserError for any other kind of file, for a tensor that belongs to no component,
    if the file contradicts the prediction type or its kind of model, and if the prediction type is needed
    but not given.
    """

    def wanted(name: str) -> bool:
        return not _LEFT_OUT.fullmatch(name) and (averaged or not name.startswith(_AVERAGES))

    tensors = read_weights_file(path, wanted)
    buffers = {name: tensors.pop(name) for name in BUFFERS | MARKERS if name in tensors}
    averages = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_AVERAGES)}
    parts = _parts(tensors, path)
    if averaged:
        parts[_UNET] = _averaged(parts[_UNET], averages, path)
    (conditioner,) = (prefix for prefix in _CONDITIONERS if parts[prefix])
    kind = _kind(conditioner, parts[_UNET], path)
    noise = NoiseInFile(
        path, buffers, read_metadata(path), kind.betas, needs_type=kind is _STABLE_2
    )
    scheduler = scheduler_of(noise, prediction_type)
    text = {_CLIP: _clip, _OPEN_CLIP: _open_clip}.get(conditioner)
    vae = _vae(parts[_VAE], path)
    _check_scale(buffers, vae, path)
    return Checkpoint(
        unet=_unet(parts[_UNET], kind, scheduler["prediction_type"], path),
        vae=vae,
        text_encoder=text(parts[conditioner], kind, path) if text else None,
        class_embedder=None if text else _class_embedder(parts[_CLASSES]),
        scheduler=scheduler,
    )


def _parts(tensors: Tensors, path: epath.Path) -> dict[str, dict[str, np.ndarray]]:
    """The tensors of each part by the part's prefix, which is removed from their names."""
    parts = {
        prefix: {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        for prefix in (_UNET, _VAE, *_CONDITIONERS)
    }
    found = [prefix for prefix in parts if parts[prefix]]
    conditioners = [prefix for prefix in _CONDITIONERS if parts[prefix]]
    lacks = {
        f"U-Net ({_UNET}*)": parts[_UNET],
        f"autoencoder ({_VAE}*)": parts[_VAE],
        "text encoder or table of classes (cond_stage_model.*)": conditioners,
    }
    missing = [what for what, part in lacks.items() if not part]
    if not found:
        raise UserError(
            f"{path} is not a checkpoint of Stable Diffusion 1 or 2 or of a class-conditional latent "
            f"diffusion model, because none of its tensors has a name of theirs: import a diffusers "
            f"folder of the model instead"
        )
    if missing:
        raise UserError(
            f"{path} has no {' and no '.join(missing)}: import a file that holds the complete model, or "
            f"a diffusers folder of it"
        )
    if len(conditioners) > 1:
        raise UserError(
            f"{path} holds {' and '.join(f'{prefix}*' for prefix in conditioners)}, but a model "
            f"has one of them: import a diffusers folder of the model instead"
        )
    if strange := sorted(name for name in tensors if not name.startswith(tuple(parts))):
        raise UserError(
            f"{path} holds tensors that belong to no part of the model, such as {strange[0]}: convert "
            f"the file to a diffusers folder first"
        )
    return parts


def _averaged(unet: Tensors, averages: Tensors, path: epath.Path) -> dict[str, np.ndarray]:
    """The U-Net's EMA weights, whose names are those of its weights without the dots."""
    if not averages:
        raise UserError(f"{path} holds no EMA weights (model_ema.*): leave out --averaged")
    names = {name: f"{_AVERAGES}diffusion_model{name.replace('.', '')}" for name in unet}
    return {
        name: _need(averages, average, path, axes=unet[name].ndim)
        for name, average in names.items()
    }


def _kind(conditioner: str, unet: Tensors, path: epath.Path) -> _Kind:
    """Return the kind of model: Stable Diffusion 2 projects with matrices, 1 with convolutions."""
    if conditioner == _CLASSES:
        return _OF_CLASSES
    projections = [
        tensor for name, tensor in unet.items() if re.fullmatch(r".*\.1\.proj_in\.weight", name)
    ]
    if projections and all(tensor.ndim == 2 for tensor in projections):
        return _STABLE_2
    if conditioner == _OPEN_CLIP:
        raise UserError(
            f"{path} holds the text encoder of {_STABLE_2.name} and the U-Net of {_STABLE_1.name}: "
            f"import a diffusers folder of the model instead"
        )
    return _STABLE_1


def _check_scale(buffers: Tensors, vae: Component, path: epath.Path) -> None:
    scale = vae.config["scaling_factor"]
    stored = buffers.get("scale_factor")
    if stored is not None and not np.isclose(stored, scale, rtol=5e-3):
        raise UserError(
            f"{path} scales its latents by {float(stored):g}, but its kind of model by {scale:g}: "
            f"convert it to a diffusers folder with that scaling_factor in vae/config.json"
        )


def write_folder(checkpoint: Checkpoint, folder: epath.Path, tokenizer: epath.Path | None) -> None:
    """Write a checkpoint as a diffusers folder.

    tokenizer: a folder to copy; None for a class-conditional model, whose class embedder, unknown to
    diffusers' pipelines, gets its own folder.
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


def _renamed(
    tensors: Tensors, rename: Callable[[str], str | None], prefix: str, path: epath.Path
) -> dict[str, np.ndarray]:
    renamed = {}
    for name, tensor in tensors.items():
        new = rename(name)
        if new is None:
            raise UserError(
                f"{path} holds {prefix}{name}, which no supported model has: import a diffusers folder "
                f"of the model instead"
            )
        renamed[new] = tensor
    return renamed


def _numbers(tensors: Tensors, pattern: str) -> set[int]:
    """The numbers that the pattern's group matches in the tensors' names."""
    found = re.compile(pattern)
    return {int(match[1]) for name in tensors if (match := found.match(name))}


def _length(tensors: Tensors, pattern: str) -> int:
    """The length of a list whose entries' numbers the pattern's group matches."""
    return 1 + max(_numbers(tensors, pattern), default=-1)


def _need(tensors: Tensors, name: str, path: epath.Path, *, axes: int) -> np.ndarray:
    if name not in tensors:
        raise UserError(f"{path} lacks the tensor {name}: check that the file is complete")
    if (found := tensors[name]).ndim != axes:
        raise UserError(
            f"{path}: the tensor {name} has {found.ndim} axes instead of {axes}: check that the file is "
            f"complete"
        )
    return found


def _unet(tensors: Tensors, kind: _Kind, prediction_type: str, path: epath.Path) -> Component:
    downsamplers = sorted(
        int(match[1])
        for name in tensors
        if (match := re.fullmatch(r"input_blocks\.(\d+)\.0\.op\.weight", name))
    )
    if not downsamplers or downsamplers[0] < 2:
        raise UserError(
            f"{path} has a U-Net with one resolution, which isn't supported: import one with more"
        )
    layers = downsamplers[0] - 1
    renamed = _renamed(tensors, lambda name: unet_name(name, layers_per_block=layers), _UNET, path)
    levels = range(len(downsamplers) + 1)
    widths = [
        len(_need(renamed, f"down_blocks.{level}.resnets.0.conv1.bias", path, axes=1))
        for level in levels
    ]
    attends = [
        any(name.startswith(f"down_blocks.{i}.attentions.") for name in renamed) for i in levels
    ]
    middle = "mid_block.attentions.0"
    inputs = _need(renamed, "conv_in.weight", path, axes=4).shape[1]
    config = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "sample_size": _sample_size(kind, inputs, prediction_type),
        "in_channels": inputs,
        "out_channels": len(_need(renamed, "conv_out.bias", path, axes=1)),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if each else "DownBlock2D" for each in attends],
        "up_block_types": [
            "CrossAttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attends)
        ],
        "cross_attention_dim": _need(
            renamed, f"{middle}.transformer_blocks.0.attn2.to_k.weight", path, axes=2
        ).shape[1],
        "attention_head_dim": _heads(kind, widths, inputs),
        "use_linear_projection": kind is _STABLE_2,
    }
    return Component(config, renamed)


def _sample_size(kind: _Kind, channels: int, prediction_type: str) -> int:
    """Latents per side of the released models.

    The images have 512 pixels; 768 if Stable Diffusion 2 predicts v; 256 for class-conditional models.
    """
    if kind is _OF_CLASSES:
        return 64 if channels == 3 else 32
    return 96 if kind is _STABLE_2 and prediction_type == "v_prediction" else 64


def _heads(kind: _Kind, widths: list[int], channels: int) -> int | list[int]:
    """The number of attention heads, which diffusers calls attention_head_dim in a U-Net.

    It doesn't follow from the shapes. Stable Diffusion 1 has 8 heads, and 2 has heads of 64 channels. The
    class-conditional models have one head (3 latent channels) or heads of 32 channels (4).
    """
    if kind is _STABLE_1:
        return 8
    if kind is _STABLE_2:
        return [max(1, width // 64) for width in widths]
    return 1 if channels == 3 else [width // 32 for width in widths]


def _vae(tensors: Tensors, path: epath.Path) -> Component:
    levels = _length(tensors, r"encoder\.down\.(\d+)\.")
    renamed = {
        # diffusers' projections of attention are matrices, the file's are 1x1 convolutions.
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
        "in_channels": _need(renamed, "encoder.conv_in.weight", path, axes=4).shape[1],
        "out_channels": len(_need(renamed, "decoder.conv_out.bias", path, axes=1)),
        "block_out_channels": [
            len(_need(renamed, f"encoder.down_blocks.{level}.resnets.0.conv2.bias", path, axes=1))
            for level in range(levels)
        ],
        "layers_per_block": _length(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": _need(renamed, "post_quant_conv.weight", path, axes=4).shape[0],
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


def _clip(tensors: Tensors, kind: _Kind, path: epath.Path) -> Component:
    """CLIP's text encoder; its names in the file begin with `text_model.`, as before transformers 5."""
    named = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    return _text_encoder(named, kind, path)


def _open_clip(tensors: Tensors, kind: _Kind, path: epath.Path) -> Component:
    kept = {}
    for name, tensor in tensors.items():
        if joint := re.fullmatch(
            r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name
        ):
            if tensor.ndim == 0 or len(tensor) % 3:
                raise UserError(
                    f"{path}: {_OPEN_CLIP}{name} can't be split in three: check that the file is "
                    f"complete"
                )
            for letter, part in zip("qkv", np.split(tensor, 3), strict=True):
                kept[f"encoder.layers.{joint[1]}.self_attn.{letter}_proj.{joint[2]}"] = part
        else:
            kept |= _renamed({name: tensor}, open_clip_name, _OPEN_CLIP, path)
    return _text_encoder(kept, kind, path)


def _text_encoder(tensors: Tensors, kind: _Kind, path: epath.Path) -> Component:
    """The text encoder's component.

    Stable Diffusion 2 uses the states before the last block, so that block, if the file has it, is left
    out.
    """
    unread = f"encoder.layers.{kind.text_layers}." if kind is _STABLE_2 else None
    kept = {
        name: each for name, each in tensors.items() if not unread or not name.startswith(unread)
    }
    numbers = _numbers(kept, r"encoder\.layers\.(\d+)\.")
    if numbers != set(range(kind.text_layers)):
        wrong = min(numbers ^ set(range(kind.text_layers)))
        raise UserError(
            f"{path} {'has' if wrong in numbers else 'lacks'} block {wrong} of the text encoder, but "
            f"{kind.name} has blocks 0 to {kind.text_layers - 1}: check that the file is complete"
        )
    vocabulary, width = _need(kept, "embeddings.token_embedding.weight", path, axes=2).shape
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": len(_need(kept, "encoder.layers.0.mlp.fc1.bias", path, axes=1)),
        "num_hidden_layers": kind.text_layers,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": len(
            _need(kept, "embeddings.position_embedding.weight", path, axes=2)
        ),
        "hidden_act": kind.activation,
        "layer_norm_eps": 1e-5,
    }
    return Component(config, kept)


def _class_embedder(tensors: Tensors) -> Component:
    return Component(
        {"_class_name": "ClassEmbedder"},
        {f"embedding.{name}": tensor for name, tensor in tensors.items()},
    )
