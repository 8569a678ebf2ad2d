import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from PIL import Image
from random_arrays import random_pixels
from text_cases import CLIP, write_clip_tokenizer
from text_models import random_params

from guided_distill.data.pixels import from_uint8
from guided_distill.errors import UserError
from guided_distill.evaluation import clip
from guided_distill.layouts.torch_layout import to_tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small CLIP with random weights, as transformers saves one."""
    path = tmp_path_factory.mktemp("clip")
    write_clip_tokenizer(path, "sd1")
    (path / "config.json").write_text(json.dumps({"model_type": "clip", **CLIP}))
    text = {key: each for key, each in CLIP["text_config"].items() if key != "eos_token_id"}
    network = clip.CLIP(text, CLIP["vision_config"], CLIP["projection_dim"])
    shapes = ((1, 16, 16, 3), np.float32), ((1, 2), int), ((), int)
    params = random_params(network, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    tensors = to_tensors(params)
    token = "vision_model.embeddings.class_embedding"
    tensors[token] = tensors.pop(f"{token}.bias")
    tensors |= {
        "logit_scale": np.array(2, np.float32),
        "text_model.embeddings.position_ids": np.arange(3),
    }
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return path


def test_every_image_is_held_against_its_own_caption(folder):
    scorer = clip.load_clip_scorer(epath.Path(folder))
    images = from_uint8(random_pixels(33, 16, 16, 3))
    captions = [f"number {number}" for number in range(33)]
    scores = scorer(images, captions)
    assert scores.shape == (33,)
    assert np.abs(scores).max() <= 1
    assert scores.std() > 0.01
    tokens, _ = scorer.tokenizer(captions)
    embedded = jax.jit(scorer.network.apply)(
        {"params": scorer.params}, clip.preprocess(images, 16), tokens, scorer.tokenizer.end
    )
    for vectors in embedded:
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    cosines = np.asarray(embedded[0]) @ np.asarray(embedded[1]).T
    np.testing.assert_allclose(scores, np.diag(cosines), atol=1e-5)
    order = np.arange(33)[::-1]
    mixed = scorer(images[order], captions)
    np.testing.assert_allclose(mixed, cosines[order, np.arange(33)], atol=1e-5)
    assert scorer(images[:0], []).shape == (0,)
    with pytest.raises(UserError, match="33 images and 1 captions"):
        scorer(images, captions[:1])


@pytest.mark.parametrize("side", [8, 16, 40])
def test_images_are_resized_as_pillow_does(side):
    # Of middling contrast: Pillow clips to 8 bits between the two directions, too.
    small = Image.fromarray(random_pixels(5, 5, 3) // 3 + 85)
    smooth = small.resize((side, side), Image.Resampling.BICUBIC)
    expected = np.asarray(smooth.resize((16, 16), Image.Resampling.BICUBIC)) / 255
    found = clip.preprocess(from_uint8(np.asarray(smooth))[None], 16)[0]
    pixels = found * np.array(clip.PIXEL_STD)[None, None] + np.array(clip.PIXEL_MEAN)[None, None]
    np.testing.assert_allclose(pixels, expected, atol=1.6 / 255)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", '{"model_type": "siglip"}', r"model_type is 'siglip'; supported are clip"),
        (
            "config.json",
            json.dumps({"model_type": "clip", **CLIP, "vision_config": {"patch_size": 0}}),
            r"patch_size is 0",
        ),
        (
            "config.json",
            json.dumps({"model_type": "clip", **CLIP, "projection_dim": 21}),
            r"text_projection\.weight \(20 x 24, not 21 x 24\)",
        ),
        ("model.safetensors", None, r"has no weights: model\.safetensors is missing"),
        ("vocab.json", None, r"vocab\.json is missing"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(tmp_path, folder, file, content, message):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        clip.load_clip_scorer(epath.Path(tmp_path))
    with pytest.raises(UserError, match="no folder"):
        clip.load_clip_scorer(epath.Path(tmp_path) / "nowhere")
