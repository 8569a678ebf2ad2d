from math import comb

import numpy as np
import pytest

from guided_distill.errors import UserError
from guided_distill.evaluation.metrics.kid import kernel_distance


def distance_of(a, b, **options):
    return kernel_distance(a, b, **options).mean


def moment_distance(a, b):
    """The same estimator for D = 1, where the kernel (x y + 1)^3 expands into products of moments."""

    def pair_mean(x, power):
        return (np.sum(x**power) ** 2 - np.sum(x ** (2 * power))) / (len(x) * (len(x) - 1))

    return sum(
        comb(3, power)
        * (pair_mean(a, power) + pair_mean(b, power) - 2 * np.mean(a**power) * np.mean(b**power))
        for power in (1, 2, 3)
    )


@pytest.mark.parametrize("sizes", [(2, 3), (40, 40), (700, 1100)])
def test_one_dimension_agrees_with_moments(sizes):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=sizes[0]), 0.5 * rng.normal(size=sizes[1]) + 1
    found = distance_of(a[:, None], b[:, None], subset_size=1100)
    assert found == pytest.approx(moment_distance(a, b), rel=1e-9)


def test_kernel_divides_by_the_dimension():
    # Repeated coordinates leave x.y / D as it is.
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(30, 2)), rng.normal(size=(20, 2)) + 1
    assert distance_of(np.tile(a, 5), np.tile(b, 5)) == pytest.approx(distance_of(a, b))


def test_two_points_by_hand():
    # k(0, 0) = 1, k(0, 1) = 1, k(1, 1) = 2^3 in one dimension.
    zeros, ones = np.zeros((2, 1)), np.ones((2, 1))
    assert distance_of(zeros, ones) == pytest.approx(1 + 8 - 2 * 1)


def test_mean_over_draws_of_one_distribution_is_zero():
    rng = np.random.default_rng(2)
    estimates = np.array(
        [
            distance_of(rng.normal(size=(12, 3)) + 1, rng.normal(size=(15, 3)) + 1)
            for _ in range(1500)
        ]
    )
    standard_error = estimates.std() / np.sqrt(len(estimates))
    assert abs(estimates.mean()) < 3 * standard_error
    assert (estimates < 0).any()


def test_mean_over_draws_is_the_distance_of_the_distributions():
    # N(0, 1) has moments 0, 1, 0 and N(1, 1) has 1, 2, 4: 3 * 1 + 3 * 1 + 1 * 16.
    rng = np.random.default_rng(3)
    estimates = np.array(
        [distance_of(rng.normal(size=(20, 1)), rng.normal(size=(20, 1)) + 1) for _ in range(1500)]
    )
    assert estimates.mean() == pytest.approx(22, abs=3 * estimates.std() / np.sqrt(1500))


def test_invariance_to_order_of_rows_and_sets():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(600, 8)), rng.normal(size=(550, 8)) + 0.5
    distance = distance_of(a, b)
    assert distance_of(rng.permutation(a), b[::-1]) == pytest.approx(distance)
    assert distance_of(b, a) == pytest.approx(distance)


def test_sets_up_to_the_subset_size_are_used_whole():
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(50, 2)), rng.normal(size=(40, 2)) + 1
    whole = distance_of(a, b)
    assert distance_of(a, b, subset_size=50, num_subsets=3, seed=7) == whole
    assert distance_of(a, b, subset_size=49, num_subsets=3, seed=7) != whole


def test_subsets_follow_the_seed_and_average_out():
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(60, 2)), rng.normal(size=(15, 2)) + 1
    whole = distance_of(a, b)

    def estimate(num_subsets, seed):
        return distance_of(a, b, subset_size=20, num_subsets=num_subsets, seed=seed)

    assert estimate(2, 0) == estimate(2, 0)
    assert estimate(2, 0) != estimate(2, 1)
    single = np.array([estimate(1, seed) for seed in range(800)])
    assert estimate(800, 0) == pytest.approx(whole, abs=4 * single.std() / np.sqrt(800))
    averaged = np.array([estimate(16, seed) for seed in range(100)])
    assert averaged.std() == pytest.approx(single.std() / 4, rel=0.3)


def test_subsets_are_those_of_the_literature():
    # 100 subsets of 1,000 rows, whose estimates follow from moments in one dimension.
    rng = np.random.default_rng(8)
    a, b = rng.normal(size=1500), rng.normal(size=400) + 1
    found = kernel_distance(a[:, None].astype(np.float32), b[:, None], seed=3)
    draws = np.random.default_rng(3)
    rows = [draws.choice(1500, size=1000, replace=False) for _ in range(100)]
    estimates = [moment_distance(a[each], b) for each in rows]
    assert found.mean == pytest.approx(np.mean(estimates), rel=1e-5)
    assert found.std == pytest.approx(np.std(estimates), rel=1e-4)
    assert kernel_distance(a[:1000, None], b[:, None]).std is None


@pytest.mark.parametrize("size", [5, 600])
def test_few_subsets_of_large_sets_are_measured_one_by_one_and_many_together(size):
    rng = np.random.default_rng(9)
    a, b = rng.normal(size=(900, 4)), rng.normal(size=(700, 4)) + 0.3
    draws = np.random.default_rng(1)
    estimates = [
        distance_of(*(x[draws.choice(len(x), size=size, replace=False)] for x in (a, b)))
        for _ in range(7)
    ]
    found = kernel_distance(a, b, subset_size=size, num_subsets=7, seed=1)
    assert found.mean == pytest.approx(np.mean(estimates), rel=1e-9)
    assert found.std == pytest.approx(np.std(estimates), rel=1e-9)


def test_subsets_hold_no_row_twice():
    # One far row: a subset drawn with replacement would pair it with itself.
    a = np.zeros((20, 1))
    a[0] = 10.0
    estimates = [
        distance_of(a, np.zeros((20, 1)), subset_size=19, num_subsets=1, seed=seed)
        for seed in range(50)
    ]
    assert max(estimates) < 1e-9


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        (np.zeros((4, 2)), np.zeros((4, 3)), {}, "same dimension, got 2 and 3"),
        (np.zeros((1, 2)), np.zeros((4, 2)), {}, "at least 2 rows, got 1"),
        (np.zeros((4, 2)), np.zeros((1, 2)), {}, "at least 2 rows, got 1"),
        (np.zeros((4, 2)), np.full((4, 2), np.nan), {}, "NaN or infinity"),
        (np.zeros((4, 2)), np.zeros((4, 2)), {"subset_size": 1}, "subset_size"),
        (np.zeros((4, 2)), np.zeros((4, 2)), {"num_subsets": 0}, "num_subsets"),
    ],
)
def test_input_that_cannot_be_compared(a, b, options, message):
    with pytest.raises(UserError, match=message):
        distance_of(a, b, **options)
