"""Write compvis_names.json: layers of CompVis' checkpoints, and what diffusers calls each.

pip install -e '.[parity]' && python tests/parity/compvis_golden.py
"""

import itertools
import json
from pathlib import Path

import torch
from diffusers.loaders import single_file_utils as theirs
from transformers import CLIPTextConfig, CLIPTextModel

UNETS = {
    "two_levels": {"layers": 1, "attends": [True, False]},
    "four_levels": {"layers": 2, "attends": [False, True, True, True]},
}
RESNET = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"]
ATTENTION = ["norm", "proj_in", "proj_out"] + [
    f"transformer_blocks.0.{part}"
    for part in [
        *("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"),
        *(f"{a}.{b}" for a in ("attn1", "attn2") for b in ("to_q", "to_k", "to_v", "to_out.0")),
    ]
]
VAE_RESNET = ["norm1", "conv1", "norm2", "conv2", "nin_shortcut"]
VAE_ATTENTION = ["norm", "q", "k", "v", "proj_out"]


def unet_layers(layers, attends):
    """Modules of openaimodel.UNetModel, in the order in which its constructor makes them."""
    yield from ("time_embed.0", "time_embed.2", "input_blocks.0.0")
    number = itertools.count(1)
    for level, attend in enumerate(attends):
        for _ in range(layers):
            block = f"input_blocks.{next(number)}"
            yield from (f"{block}.0.{part}" for part in [*RESNET, "skip_connection"])
            if attend:
                yield from (f"{block}.1.{part}" for part in ATTENTION)
        if level < len(attends) - 1:
            yield f"input_blocks.{next(number)}.0.op"
    for index, parts in enumerate([RESNET, ATTENTION, RESNET]):
        yield from (f"middle_block.{index}.{part}" for part in parts)
    number = itertools.count()
    for level, attend in reversed(list(enumerate(attends))):
        for index in range(layers + 1):
            block = f"output_blocks.{next(number)}"
            yield from (f"{block}.0.{part}" for part in [*RESNET, "skip_connection"])
            if attend:
                yield from (f"{block}.1.{part}" for part in ATTENTION)
            if level and index == layers:
                yield f"{block}.{1 + attend}.conv"
    yield from ("out.0", "out.2")


def vae_layers(levels, layers):
    """Modules of the encoder and the decoder of ldm's autoencoder."""
    for side, count, end in (
        ("encoder.down", layers, "downsample"),
        ("decoder.up", layers + 1, "upsample"),
    ):
        half = side.partition(".")[0]
        yield f"{half}.conv_in"
        for level in range(levels):
            for index in range(count):
                yield from (f"{side}.{level}.block.{index}.{part}" for part in VAE_RESNET)
            if level != (levels - 1 if half == "encoder" else 0):
                yield f"{side}.{level}.{end}.conv"
        for index in (1, 2):
            yield from (f"{half}.mid.block_{index}.{part}" for part in VAE_RESNET[:-1])
        yield from (f"{half}.mid.attn_1.{part}" for part in VAE_ATTENTION)
        yield from (f"{half}.norm_out", f"{half}.conv_out")
    yield from ("quant_conv", "post_quant_conv")


def open_clip_layers(depth):
    """Modules of OpenCLIP's text transformer, but for its joint projection."""
    for index in range(depth):
        parts = ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
        yield from (f"transformer.resblocks.{index}.{part}" for part in parts)
    yield "ln_final"


def pairs(layers, prefix, convert):
    """What diffusers calls each layer: a weight is known by the number in it."""
    names = list(layers)
    numbered = {
        f"{prefix}{name}.{leaf}": torch.tensor([float(i)])
        for i, name in enumerate(names)
        for leaf in ("weight", "bias")
    }
    found = {
        names[int(value.item())]: name.removesuffix(".weight")
        for name, value in convert(numbered).items()
        if name.endswith(".weight")
    }
    assert found.keys() == set(names), set(names) - found.keys()
    return found


golden = {
    name: pairs(
        unet_layers(**shape),
        "model.diffusion_model.",
        lambda tensors, layers=shape["layers"]: theirs.convert_ldm_unet_checkpoint(
            tensors, {"layers_per_block": layers}
        ),
    )
    for name, shape in UNETS.items()
}
golden["vae"] = pairs(
    vae_layers(levels=3, layers=2),
    "first_stage_model.",
    lambda tensors: theirs.convert_ldm_vae_checkpoint(
        tensors, {"down_block_types": [None] * 3, "up_block_types": [None] * 3}
    ),
)
small = CLIPTextConfig(
    vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
)
golden["open_clip"] = pairs(
    open_clip_layers(2),
    "cond_stage_model.model.",
    lambda tensors: theirs.convert_open_clip_checkpoint(CLIPTextModel(small), tensors),
)
path = Path(__file__).with_name("compvis_names.json")
path.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
