"""Our names for CompVis' checkpoints against those of diffusers' converter (see compvis_golden.py)."""

import json
from pathlib import Path

import pytest

from guided_distill.formats.compvis_names import open_clip_name, unet_name, vae_name

GOLDEN = json.loads(Path(__file__).with_name("compvis_names.json").read_text())


@pytest.mark.parametrize("leaf", ["weight", "bias"])
@pytest.mark.parametrize(
    ("network", "rename"),
    [
        ("two_levels", lambda name: unet_name(name, layers_per_block=1)),
        ("four_levels", lambda name: unet_name(name, layers_per_block=2)),
        ("vae", lambda name: vae_name(name, levels=3)),
        ("open_clip", lambda name: f"text_model.{open_clip_name(name)}"),
    ],
)
def test_names_are_those_of_diffusers(network, rename, leaf):
    for theirs, expected in GOLDEN[network].items():
        assert rename(f"{theirs}.{leaf}") == f"{expected}.{leaf}"


def test_strange_names_have_no_place():
    assert unet_name("label_emb.0.0.weight", layers_per_block=2) is None
    assert unet_name("input_blocks.1.0.strange.weight", layers_per_block=2) is None
    assert unet_name("input_blocks.1.0.in_layers.0.0.weight", layers_per_block=2) is None
    assert vae_name("encoder.mid.attn_1.strange.weight", levels=3) is None
    assert vae_name("loss.weight", levels=3) is None
    assert open_clip_name("visual.proj.weight") is None
