import numpy as np
import pytest
from sklearn.linear_model import Ridge

from guided_distill.errors import UserError
from guided_distill.evaluation.metrics.alignment import CaptionGuess


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_the_fit_is_a_ridge_regression_with_an_intercept(rng):
    x, y = rng.normal(3, 1, (40, 6)), rng.normal(-2, 1, (40, 5))
    new = rng.normal(3, 1, (7, 6))
    guess = CaptionGuess.fit(x, y, ridge=12.0)
    expected = Ridge(alpha=12.0).fit(x, y).predict(new) - y.mean(0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(guess.directions(new), expected, atol=1e-10)


def test_captions_that_features_predict_are_found_among_unseen_ones(rng):
    embeddings = rng.normal(5, 1, (130, 8))
    features = embeddings @ rng.normal(size=(8, 8)) + 1
    guess = CaptionGuess.fit(features[:100], embeddings[:100], ridge=1e-9)
    order = rng.permutation(30)
    right = guess.align(features[100:][order], embeddings[100:], order)
    assert (right.recall_at_1, right.recall_at_10) == (1, 1)
    assert right.cosine == pytest.approx(1)
    wrong = guess.align(features[100:][order], embeddings[100:], np.roll(order, 1))
    assert wrong.recall_at_1 == 0
    assert abs(wrong.cosine) < 0.3


def test_unrelated_samples_score_at_chance(rng):
    embeddings = rng.normal(4, 1, (500, 16))
    guess = CaptionGuess.fit(rng.normal(size=(500, 16)), embeddings)
    found = guess.align(rng.normal(size=(4000, 16)), embeddings[:100], np.arange(4000) % 100)
    assert found.recall_at_1 == pytest.approx(0.01, abs=0.008)
    assert found.recall_at_10 == pytest.approx(0.1, abs=0.02)
    assert found.cosine == pytest.approx(0, abs=0.02)


def test_recall_counts_the_captions_that_are_nearer():
    basis = np.eye(12)
    guess = CaptionGuess(np.zeros(12), np.zeros(12), basis)
    sample = np.arange(12.0, 0, -1)[None]
    found = [guess.align(sample, basis, np.array([number])) for number in range(12)]
    assert [each.recall_at_1 for each in found] == [1] + [0] * 11
    assert [each.recall_at_10 for each in found] == [1] * 10 + [0] * 2
    np.testing.assert_allclose([each.cosine for each in found], sample[0] / np.linalg.norm(sample))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.zeros((3, 5))}, "same dimension, got 5 and 4"),
        ({"embeddings": np.zeros((2, 4))}, "same dimension, got 4 and 3"),
        ({"features": np.full((3, 4), np.nan)}, "NaN"),
        ({"captions": np.array([0, 1])}, "each of 3 samples needs"),
        ({"captions": np.array([0, 1, 2])}, "each of 3 samples needs the index.*from 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(rng, change, message):
    guess = CaptionGuess.fit(rng.normal(size=(9, 4)), rng.normal(size=(9, 3)))
    fits = {
        "features": np.zeros((3, 4)),
        "embeddings": np.ones((2, 3)),
        "captions": np.array([0, 1, 1]),
    }
    with pytest.raises(UserError, match=message):
        guess.align(**{**fits, **change})
    with pytest.raises(UserError, match=r"features of 9 images and embeddings of 8 captions"):
        CaptionGuess.fit(np.zeros((9, 4)), np.zeros((8, 3)))
