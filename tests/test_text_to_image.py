"""A small text-to-image run of its own latent space, and what is made with its students."""

import json

import numpy as np
import pytest
from etils import epath
from text_models import write_minilm

from guided_distill import cli
from guided_distill.applications.text_to_image import load_text_to_image
from guided_distill.latent_space import load_latent_space
from guided_distill.pipeline import finished_stages

SIDE = 16
PROMPTS = ["red apple", "two apples"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_minilm(folder / "minilm")
    count = 24
    np.savez(
        folder / "drawings.npz",
        image=np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8),
        label=np.arange(count) % 3,
        caption=np.array(PROMPTS * (count // 2)),
        group=np.arange(count) // 2,
    )
    return [
        "--config=configs/emoji.py:runlocal",
        f"--config.data.name=npz:{folder / 'drawings.npz'}",
        f"--config.data.image_size={SIDE}",
        f"--config.data.text_encoder=minilm:{folder / 'minilm'}",
        "--config.model.options.cross_attention_dim=24",
    ]


@pytest.fixture(scope="module")
def workdir(arguments, tmp_path_factory):
    path = epath.Path(tmp_path_factory.mktemp("run"))
    assert cli.main(["train", "--workdir", str(path), *arguments]) == 0
    return path


@pytest.fixture(scope="module")
def model(workdir):
    return load_text_to_image(workdir / "halving_ddim_2")


def images():
    return np.random.default_rng(1).uniform(-1, 1, (2, SIDE, SIDE, 3)).astype(np.float32)


def test_every_stage_is_trained_on_latents_of_texts(workdir, arguments):
    assert finished_stages(workdir) == ["teacher", "guidance", "halving_ddim_2", "halving_ddim_1"]
    index = json.loads((workdir / "companions" / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "BertModel"]
    space = load_latent_space(workdir)
    train = np.load(arguments[1].partition("npz:")[2])["image"] / 127.5 - 1
    assert 0.5 < space.to_latents(train.astype(np.float32)).std() < 2
