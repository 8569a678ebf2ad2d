"""The extractors' networks give what torch's implementations of them give (see extractors.py)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from random_arrays import random_pixels, random_tensors, spots

from guided_distill.data.pixels import from_uint8
from guided_distill.evaluation.extractors import inception, lite0
from guided_distill.evaluation.extractors.pretrained import tensor_shapes, to_colour_squares

GOLDENS = json.loads(Path(__file__).with_name("extractors.json").read_text())


def test_lite0_with_its_packaged_weights():
    extractor = lite0.lite0_extractor((32, 32, 3))
    assert extractor.name == "lite0-64"
    features, logits = extractor(from_uint8(random_pixels(3, 32, 32, 3)))
    np.testing.assert_allclose(spots(features, 64), GOLDENS["lite0"]["features"], atol=1e-4)
    np.testing.assert_allclose(spots(logits, 32), GOLDENS["lite0"]["logits"], atol=1e-4)


def test_inception_block_by_block(tmp_path):
    file = epath.Path(tmp_path) / "weights.safetensors"
    shapes = tensor_shapes(inception.param_shapes(), inception.source)
    safetensors.numpy.save_file(random_tensors(shapes), file)
    variables = {"params": inception.inception_params(file)}
    x = from_uint8(random_pixels(1, 107, 107, 3))
    run = jax.jit(lambda v, x: inception.InceptionV3().apply(v, x, capture_intermediates=True))
    (features, logits), state = run(variables, x)
    blocks = {
        name: each["__call__"][0]
        for name, each in state["intermediates"].items()
        if name.startswith("Mixed")
    }
    for name, output in {**blocks, "features": features, "logits": logits}.items():
        expected = np.array(GOLDENS["inception"][name])
        assert np.abs(expected).max() > 0.01
        np.testing.assert_allclose(spots(output), expected, atol=1e-4, err_msg=name)
    assert len(blocks) == len(GOLDENS["inception"]) - 2


@pytest.mark.parametrize("side", [32, 400])
def test_images_are_resized_as_for_fid(side):
    pixels = random_pixels(1, side, side, 3).astype(np.float32)
    found = to_colour_squares(jnp.asarray(pixels), 299, smooth=False)
    np.testing.assert_allclose(spots(found), GOLDENS["resized"][str(side)], atol=1e-3)
