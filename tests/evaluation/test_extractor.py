"""Extractors: features depend neither on the batch nor on the number of devices."""

import jax
import numpy as np
import pytest

from guided_distill.data.pixels import from_uint8
from guided_distill.evaluation.extractors.classifier import BATCH, Classifier, classifier_extractor
from guided_distill.evaluation.extractors.extractor import Extractor


def random_classifier(shape):
    classifier = Classifier(num_classes=3)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(classifier.init, jax.random.key(0), np.zeros((1, *shape)))["params"]
    params = jax.tree.map(
        lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), shapes
    )
    return classifier_extractor(classifier, params, shape, scale=2.0)


@pytest.mark.parametrize("shape", [(2,), (8, 8, 1)])
def test_features_do_not_depend_on_how_samples_are_batched(shape):
    extractor = random_classifier(shape)
    rng = np.random.default_rng(1)
    samples = rng.standard_normal((BATCH + 5, *shape)).astype(np.float32)
    features, logits = extractor(samples)
    assert features.shape == (BATCH + 5, extractor.width)
    assert logits.shape == (BATCH + 5, 3)
    pieces = [extractor(part) for part in np.split(samples, [BATCH - 1, BATCH + 4])]
    for whole, parts in zip((features, logits), zip(*pieces, strict=True), strict=True):
        np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-4, atol=1e-4)
    assert np.ptp(logits, axis=0).min() > 0.5


def pixel_sums(mesh):
    return Extractor(
        name="sums",
        width=1,
        own_classes=False,
        apply=lambda params, x: (params * x.sum(axis=(1, 2)), x[:, 0, 0]),
        params=np.float32(2),
        batch_size=6,
        mesh=mesh,
    )


def test_devices_make_no_difference(mesh_of):
    samples = np.random.default_rng(0).uniform(-1, 1, (23, 4, 4, 1)).astype(np.float32)
    one, four = (pixel_sums(mesh_of(count))(samples) for count in (1, 4))
    assert one[0].shape == (23, 1)
    for left, right in zip(one, four, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6)


def test_images_are_rounded_to_8_bits_first(mesh_of):
    extractor = pixel_sums(mesh_of(1))
    levels = np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1)
    exact = from_uint8(levels)
    step = 2 / 255
    near = exact + np.random.default_rng(0).uniform(-0.49, 0.49, exact.shape) * step
    np.testing.assert_array_equal(extractor(near)[1], extractor(exact)[1])
    np.testing.assert_array_equal(extractor(exact + 10 * step)[1][-10:], 1)


def test_two_batches_are_on_the_devices_at_most(mesh_of):
    extractor, running, most = pixel_sums(mesh_of(1)), [], []

    class Output:
        def __init__(self, value):
            self.value = value
            running.append(self)

        def __array__(self, dtype=None, copy=None):
            if self in running:
                running.remove(self)
            return np.asarray(self.value)

    def run(params, batch):
        outputs = [Output(each) for each in extractor.apply(params, np.asarray(batch))]
        most.append(len(running) / len(outputs))
        return outputs

    extractor.__dict__["_run"] = run
    samples = np.random.default_rng(0).uniform(-1, 1, (47, 4, 4, 1)).astype(np.float32)
    assert extractor(samples)[0].shape == (47, 1)
    assert len(most) == 8
    assert max(most) == 2
