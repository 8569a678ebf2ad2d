"""Translates tensors' names from CompVis' latent diffusion and OpenCLIP to diffusers and transformers.

Every function translates one name, and returns None for a name that the network doesn't have.
"""

import re

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}

_UNET = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}

_UNET_BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)")
_UNET_MIDDLE = re.compile(r"middle_block\.([012])\.(.+)")

_VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_VAE_BLOCK = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(block|attn)\.(\d+)\.(.+)")
_VAE_RESAMPLE = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(downsample|upsample)\.conv")
_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(block|attn)_(\d)\.(.+)")

_CLIP_FIXED = {
    "token_embedding": "embeddings.token_embedding",
    "ln_final": "final_layer_norm",
}
_CLIP_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def unet_name(name: str, *, layers_per_block: int) -> str | None:
    """diffusers' name for a tensor of the U-Net, given without its prefix `model.diffusion_model.`"""
    layer, _, leaf = name.rpartition(".")
    if layer in _UNET:
        return f"{_UNET[layer]}.{leaf}"
    if block := _UNET_BLOCK.fullmatch(layer):
        side, number, part, rest = block.groups()
        down = side == "input"
        level, entry = divmod(int(number) - down, layers_per_block + 1)
        where = f"{'down' if down else 'up'}_blocks.{level}"
        if rest in ("op", "conv"):
            resampler = "downsamplers" if down else "upsamplers"
            return f"{where}.{resampler}.0.conv.{leaf}"
        return _unet_layer(where, "resnets" if part == "0" else "attentions", entry, rest, leaf)
    if middle := _UNET_MIDDLE.fullmatch(layer):
        part, rest = middle.groups()
        kind = "attentions" if part == "1" else "resnets"
        return _unet_layer("mid_block", kind, int(part) // 2, rest, leaf)
    return None


def _unet_layer(where: str, kind: str, entry: int, rest: str, leaf: str) -> str | None:
    inner = _RESNET.get(rest) if kind == "resnets" else rest
    return inner and f"{where}.{kind}.{entry}.{inner}.{leaf}"


def vae_name(name: str, *, levels: int) -> str | None:
    """diffusers' name for a tensor of the autoencoder, given without its prefix `first_stage_model.`

    levels: the number of resolutions, which the decoder counts in reverse.
    """
    layer, _, leaf = name.rpartition(".")
    if block := _VAE_BLOCK.fullmatch(layer):
        side, number, kind, entry, rest = block.groups()
        return _vae_layer(_vae_level(side, int(number), levels), kind, int(entry), rest, leaf)
    if resample := _VAE_RESAMPLE.fullmatch(layer):
        side, number, kind = resample.groups()
        return f"{_vae_level(side, int(number), levels)}.{kind}rs.0.conv.{leaf}"
    if middle := _VAE_MIDDLE.fullmatch(layer):
        side, kind, number, rest = middle.groups()
        return _vae_layer(f"{side}.mid_block", kind, int(number) - 1, rest, leaf)
    if re.fullmatch(r"(encoder|decoder)\.norm_out", layer):
        return f"{layer.replace('norm_out', 'conv_norm_out')}.{leaf}"
    if re.fullmatch(
        r"(encoder|decoder)\.conv_(in|out)|(post_)?quant_conv|quantize\.embedding", layer
    ):
        return name
    return None


def _vae_level(side: str, number: int, levels: int) -> str:
    if side == "encoder.down":
        return f"encoder.down_blocks.{number}"
    return f"decoder.up_blocks.{levels - 1 - number}"


def _vae_layer(where: str, kind: str, entry: int, rest: str, leaf: str) -> str | None:
    if kind == "attn":
        inner = _VAE_ATTENTION.get(rest)
        return inner and f"{where}.attentions.{entry}.{inner}.{leaf}"
    return f"{where}.resnets.{entry}.{rest.replace('nin_shortcut', 'conv_shortcut')}.{leaf}"


def open_clip_name(name: str) -> str | None:
    """transformers' name for a tensor of OpenCLIP's text encoder, without `cond_stage_model.model.`

    The joint projection of queries, keys and values has no such name: the caller splits it first.
    """
    if name == "positional_embedding":
        return "embeddings.position_embedding.weight"
    layer, _, leaf = name.rpartition(".")
    if layer in _CLIP_FIXED:
        return f"{_CLIP_FIXED[layer]}.{leaf}"
    if (block := _CLIP_BLOCK.fullmatch(layer)) and block[2] in _CLIP_LAYER:
        return f"encoder.layers.{block[1]}.{_CLIP_LAYER[block[2]]}.{leaf}"
    return None
