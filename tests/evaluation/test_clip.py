import json

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from random_arrays import random_pixels
from text_cases import CLIP
from text_models import write_clip_of_both

from guided_distill.data.pixels import from_uint8
from guided_distill.errors import UserError
from guided_distill.evaluation.captions import against
from guided_distill.evaluation.extractors import clip
from guided_distill.evaluation.metrics.alignment import retrieval


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    write_clip_of_both(path)
    return path


@pytest.fixture(scope="module")
def extractor(folder):
    return clip.clip_extractor((16, 16, 3), str(folder))


def test_every_image_is_compared_with_its_own_caption(extractor):
    images = from_uint8(random_pixels(33, 16, 16, 3))
    captions = np.array([f"number {number}" for number in range(33)])
    features, logits = extractor(images)
    assert logits.shape == (33, 0)
    texts = extractor.embed_texts(captions.tolist())
    assert extractor.embed_texts([]).shape == (0, extractor.width)
    for vectors in (features, texts):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    cosines = features @ texts.T
    assert cosines.std() > 0.01
    align = against(np.tile(captions, 2), extractor.embed_texts, retrieval)
    order = np.arange(33)[::-1]
    for chosen in (np.arange(33), order):
        found = align(features[chosen], captions)
        own = cosines[chosen, np.arange(33)]
        assert found.cosine == pytest.approx(own.mean(), abs=1e-6)
        first = (cosines[chosen].argmax(axis=1) == np.arange(33)).mean()
        assert found.recall_at_1 == pytest.approx(first)


def test_gray_images_are_seen_as_colour_ones(extractor, folder):
    gray = from_uint8(random_pixels(3, 16, 16, 1))
    of_gray = clip.clip_extractor((16, 16, 1), str(folder))
    np.testing.assert_array_equal(of_gray(gray)[0], extractor(gray.repeat(3, axis=3))[0])
    with pytest.raises(UserError, match=r"shape \[2\]"):
        clip.clip_extractor((2,), str(folder))


def test_other_weights_have_another_name(extractor, folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    tensors["text_projection.weight"] += 1e-3
    safetensors.numpy.save_file(tensors, weights)
    other = clip.clip_extractor((16, 16, 3), str(tmp_path))
    assert other.name != extractor.name


@pytest.mark.parametrize("side", [8, 16, 40])
def test_images_are_resized_as_pillow_does(side):
    # Moderate contrast, because Pillow also clips to 8 bits between the two directions.
    small = Image.fromarray(random_pixels(5, 5, 3) // 3 + 85)
    smooth = small.resize((side, side), Image.Resampling.BICUBIC)
    expected = np.asarray(smooth.resize((16, 16), Image.Resampling.BICUBIC)) / 255
    found = clip.preprocess(from_uint8(np.asarray(smooth))[None], 16)[0]
    pixels = found * np.array(clip.PIXEL_STD)[None, None] + np.array(clip.PIXEL_MEAN)[None, None]
    np.testing.assert_allclose(pixels, expected, atol=1.6 / 255)


@pytest.mark.parametrize(
    ("height", "width", "resized"), [(41, 29, (16, 22)), (20, 33, (26, 16)), (8, 12, (24, 16))]
)
def test_oblong_images_are_cropped_to_their_centre(height, width, resized):
    # The sizes and the crop are those observed from CLIPImageProcessor of transformers 5.
    small = Image.fromarray(random_pixels(5, 5, 3) // 3 + 85)
    smooth = small.resize((width, height), Image.Resampling.BICUBIC)
    left, top = ((side - 16) // 2 for side in resized)
    cut = smooth.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + 16, top + 16))
    found = clip.preprocess(from_uint8(np.asarray(smooth))[None], 16)[0]
    pixels = found * np.array(clip.PIXEL_STD)[None, None] + np.array(clip.PIXEL_MEAN)[None, None]
    np.testing.assert_allclose(pixels, np.asarray(cut) / 255, atol=1.6 / 255)


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
        (
            "config.json",
            json.dumps({"model_type": "clip", **CLIP, "text_config": [1]}),
            r"text_config is \[1\], and must be an object",
        ),
        ("model.safetensors", None, r"has no weights: model\.safetensors is missing"),
        ("vocab.json", None, r"vocab\.json is missing"),
    ],
)
def test_what_is_wrong_with_a_folder_is_reported(tmp_path, folder, file, content, message):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        clip.clip_extractor((16, 16, 3), str(tmp_path))
    with pytest.raises(UserError, match="no folder"):
        clip.clip_extractor((16, 16, 3), str(tmp_path / "nowhere"))
