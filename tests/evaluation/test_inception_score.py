import numpy as np
import pytest
from scipy.stats import entropy

from guided_distill.evaluation.metrics.inception_score import inception_score


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_uniform_predictions_score_one(classes):
    assert inception_score(np.full((70, classes), 3.0)) == pytest.approx(1)


def test_alike_predictions_score_one():
    logits = np.tile(np.random.default_rng(0).normal(size=8) * 4, (90, 1))
    assert inception_score(logits) == pytest.approx(1)


@pytest.mark.parametrize("classes", [2, 7])
def test_sure_and_balanced_predictions_score_the_number_of_classes(classes):
    logits = np.tile(1000 * np.eye(classes), (20, 1))
    assert inception_score(logits) == pytest.approx(classes)


def test_equals_the_mean_over_ten_splits_of_divergences():
    rng = np.random.default_rng(1)
    logits = 3 * rng.normal(size=(400, 6)) + rng.normal(size=6)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    splits = [
        np.exp(np.mean([entropy(each, part.mean(axis=0)) for each in part]))
        for part in np.split(p, 10)
    ]
    assert np.std(splits) > 0.01
    assert inception_score(logits) == pytest.approx(np.mean(splits))


def test_a_few_samples_cannot_score_more_than_a_split_holds():
    assert inception_score(1000 * np.eye(50)) == pytest.approx(5)
    assert inception_score(1000 * np.eye(3)) == pytest.approx(1)


def test_float32_logits_far_from_zero():
    logits = np.random.default_rng(2).normal(size=(40, 5)).astype(np.float32)
    assert inception_score(logits + np.float32(512)) == pytest.approx(
        inception_score(logits), rel=1e-4
    )
