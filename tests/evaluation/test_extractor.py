"""Features of many samples are those of each."""

import jax
import numpy as np
import pytest

from guided_distill.evaluation.extractor import BATCH, Classifier, Extractor


@pytest.mark.parametrize("shape", [(2,), (8, 8, 1)])
def test_features_do_not_depend_on_how_samples_are_batched(shape):
    classifier = Classifier(num_classes=3)
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((BATCH + 5, *shape)).astype(np.float32)
    shapes = jax.eval_shape(classifier.init, jax.random.key(0), samples)["params"]
    params = jax.tree.map(
        lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), shapes
    )
    extractor = Extractor("test", classifier, params, scale=2.0)
    features, classes = extractor(samples)
    assert len(features) == len(classes) == BATCH + 5
    pieces = [extractor(part) for part in np.split(samples, [BATCH - 1, BATCH + 4])]
    np.testing.assert_allclose(features, np.concatenate([each[0] for each in pieces]), rtol=1e-4)
    np.testing.assert_array_equal(classes, np.concatenate([each[1] for each in pieces]))
    assert len(np.unique(classes)) > 1
