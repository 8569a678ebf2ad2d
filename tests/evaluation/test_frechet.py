import numpy as np
import pytest
from scipy.linalg import sqrtm

from guided_distill.errors import UserError
from guided_distill.evaluation.metrics.frechet import (
    FeatureStatistics,
    frechet_distance,
    frechet_standard_error,
)


def statistics(mean, covariance):
    return FeatureStatistics(
        mean=np.asarray(mean, float), covariance=np.asarray(covariance, float), count=1000
    )


def random_covariance(rng, width):
    factor = rng.normal(size=(width, width))
    return factor @ factor.T + 0.1 * np.eye(width)


def random_rotation(rng, width):
    return np.linalg.qr(rng.normal(size=(width, width)))[0]


def distance_of_features(a, b):
    return frechet_distance(FeatureStatistics.from_features(a), FeatureStatistics.from_features(b))


def assert_same_statistics(a, b):
    assert a.count == b.count
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(a.covariance, b.covariance, rtol=1e-9, atol=1e-12)


def test_statistics_are_mean_and_unbiased_covariance():
    features = np.random.default_rng(0).normal(size=(50, 4)) * [1, 2, 3, 4] + 5
    found = FeatureStatistics.from_features(features)
    np.testing.assert_allclose(found.mean, features.mean(axis=0))
    np.testing.assert_allclose(found.covariance, np.cov(features, rowvar=False))
    assert found.count == 50


def test_statistics_of_float32_features_are_float64():
    features = np.random.default_rng(0).normal(size=(2000, 2)).astype(np.float32) + 1000
    assert features.dtype == np.float32
    found = FeatureStatistics.from_features(features)
    assert found.mean.dtype == found.covariance.dtype == np.float64
    assert_same_statistics(found, FeatureStatistics.from_features(features.astype(np.float64)))


@pytest.mark.parametrize("batch_sizes", [[97], [1] * 97, [50, 47], [1, 90, 6]])
def test_stream_equals_batch(batch_sizes):
    rng = np.random.default_rng(1)
    features = rng.normal(size=(97, 5)) @ rng.normal(size=(5, 5)) + np.arange(5)
    stream = FeatureStatistics.empty(5)
    for batch in np.split(features, np.cumsum(batch_sizes)[:-1]):
        stream = stream.accumulate(batch)
    assert_same_statistics(stream, FeatureStatistics.from_features(features))


def test_stream_keeps_a_covariance_small_beside_the_mean():
    features = np.random.default_rng(2).normal(size=(400, 2)) + 1e8
    stream = FeatureStatistics.empty(2)
    for batch in np.split(features, 8):
        stream = stream.accumulate(batch)
    np.testing.assert_allclose(stream.covariance, np.cov(features, rowvar=False), rtol=1e-6)


def test_merge_is_associative_and_takes_empty_on_either_side():
    rng = np.random.default_rng(3)
    a, b, c = (FeatureStatistics.from_features(rng.normal(size=(n, 3)) + n) for n in (5, 11, 2))
    assert_same_statistics(a.merge(b).merge(c), c.merge(b.merge(a)))
    empty = FeatureStatistics.empty(3)
    assert_same_statistics(a.merge(empty), a)
    assert_same_statistics(empty.merge(a), a)
    assert empty.merge(empty).count == 0


@pytest.mark.parametrize("rows", [8, 500])
def test_identical_sets_are_at_distance_zero(rows):
    features = np.random.default_rng(4).normal(size=(rows, 64))
    assert 0 <= distance_of_features(features, features) < 1e-6


def test_one_dimensional_gaussians():
    found = frechet_distance(statistics([1.0], [[4.0]]), statistics([-2.0], [[0.25]]))
    assert found == pytest.approx(3.0**2 + (2.0 - 0.5) ** 2)


def test_commuting_covariances():
    rng = np.random.default_rng(5)
    rotation = random_rotation(rng, 6)
    variances_a, variances_b = rng.uniform(0.1, 3, size=(2, 6))
    mean_a, mean_b = rng.normal(size=(2, 6))
    found = frechet_distance(
        statistics(mean_a, rotation * variances_a @ rotation.T),
        statistics(mean_b, rotation * variances_b @ rotation.T),
    )
    deviations = np.sqrt(variances_a) - np.sqrt(variances_b)
    assert found == pytest.approx(np.sum((mean_a - mean_b) ** 2) + np.sum(deviations**2))


def test_general_covariances_agree_with_the_matrix_square_root():
    rng = np.random.default_rng(6)
    a, b = random_covariance(rng, 12), random_covariance(rng, 12)
    expected = np.trace(a + b - 2 * sqrtm(a @ b).real)
    found = frechet_distance(statistics(np.zeros(12), a), statistics(np.zeros(12), b))
    assert found == pytest.approx(expected, rel=1e-9)


def test_covariances_of_rank_one():
    # For A = u u^T and B = v v^T the trace of the root is |u.v|.
    u, v = np.random.default_rng(7).normal(size=(2, 40))
    found = frechet_distance(
        statistics(np.zeros(40), np.outer(u, u)), statistics(np.zeros(40), np.outer(v, v))
    )
    assert found == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), abs=1e-5)


def test_point_against_gaussian():
    covariance = random_covariance(np.random.default_rng(8), 3)
    found = frechet_distance(
        statistics([1.0, 2.0, 2.0], np.zeros((3, 3))), statistics(np.zeros(3), covariance)
    )
    assert found == pytest.approx(9.0 + np.trace(covariance))


def test_fewer_rows_than_dimensions_stay_finite_and_symmetric():
    rng = np.random.default_rng(9)
    few, many = rng.normal(size=(5, 32)), rng.normal(size=(200, 32)) * 2 + 1
    assert np.isfinite(distance_of_features(few, many))
    assert distance_of_features(few, many) == pytest.approx(distance_of_features(many, few))


def test_laws_of_shift_scale_rotation_and_order():
    rng = np.random.default_rng(10)
    a = rng.normal(size=(60, 4))
    b = rng.normal(size=(80, 4)) @ rng.normal(size=(4, 4)) + 1
    shift, rotation = rng.normal(size=4), random_rotation(rng, 4)
    distance = distance_of_features(a, b)
    assert distance_of_features(a, a + shift) == pytest.approx(shift @ shift)
    assert distance_of_features(3 * a, 3 * b) == pytest.approx(9 * distance)
    assert distance_of_features(a @ rotation + shift, b @ rotation + shift) == pytest.approx(
        distance
    )
    assert distance_of_features(rng.permutation(a), b[::-1]) == pytest.approx(distance)


def test_rounding_never_makes_it_negative():
    rng = np.random.default_rng(11)
    for _ in range(50):
        features = rng.normal(size=(6, 10))
        assert distance_of_features(features, features[::-1]) >= 0


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros(3), "shape"),
        (np.zeros((3, 0)), "shape"),
        (np.zeros((0, 3)), "at least 1 row"),
        ([[1.0, np.nan]], "NaN or infinity"),
        ([[1.0, np.inf]], "NaN or infinity"),
    ],
)
def test_features_that_make_no_statistics(features, message):
    with pytest.raises(UserError, match=message):
        FeatureStatistics.from_features(features)


def test_sets_that_cannot_be_compared():
    a, b = statistics(np.zeros(2), np.eye(2)), statistics(np.zeros(3), np.eye(3))
    with pytest.raises(UserError, match="same dimension, got 2 and 3"):
        frechet_distance(a, b)
    with pytest.raises(UserError, match="same dimension, got 2 and 3"):
        a.merge(b)
    with pytest.raises(UserError, match="at least 2 rows"):
        frechet_distance(a, FeatureStatistics.from_features(np.ones((1, 2))))


def test_the_standard_error_is_the_deviation_between_draws():
    rng = np.random.default_rng(3)
    shape = rng.normal(size=(3, 3))
    other = statistics(rng.normal(size=3), random_covariance(rng, 3))
    distances, errors = [], []
    for _ in range(400):
        drawn = rng.normal(size=(500, 3)) @ shape
        own = FeatureStatistics.from_features(drawn)
        distances.append(frechet_distance(own, other))
        errors.append(frechet_standard_error(drawn, own, other))
    assert np.mean(errors) == pytest.approx(np.std(distances), rel=0.1)


def test_the_standard_error_needs_more_rows_than_dimensions():
    features = np.random.default_rng(4).normal(size=(5, 5))
    own = FeatureStatistics.from_features(features)
    assert frechet_standard_error(features, own, statistics(np.zeros(5), np.eye(5))) is None
