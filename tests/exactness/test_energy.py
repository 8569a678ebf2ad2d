import numpy as np
import pytest
from energy import energy_distance
from scipy.integrate import quad
from scipy.stats import energy_distance as rooted_energy_distance
from scipy.stats import norm

from guided_distill.errors import UserError


def mean_of_draws(draw_a, draw_b, draws=1500):
    estimates = np.array([energy_distance(draw_a(), draw_b()) for _ in range(draws)])
    return estimates.mean(), estimates.std() / np.sqrt(draws)


def test_points_by_hand():
    # A 3-4-5 triangle: two corners in a, two copies of the third in b.
    a = [[0.0, 0.0], [3.0, 0.0]]
    b = [[3.0, 4.0], [3.0, 4.0]]
    assert energy_distance(a, b) == pytest.approx(2 * 4.5 - 3)


@pytest.mark.parametrize("sizes", [(5, 9), (700, 1200)])
def test_one_dimension_agrees_with_distribution_functions(sizes):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=sizes[0]), 2 * rng.normal(size=sizes[1]) + 1
    # SciPy integrates the difference of the distribution functions, and also pairs a sample with itself.
    with_itself = rooted_energy_distance(a, b) ** 2

    def mean_gap(x):
        return np.abs(x[:, None] - x).mean()

    expected = with_itself - mean_gap(a) / (len(a) - 1) - mean_gap(b) / (len(b) - 1)
    assert energy_distance(a[:, None], b[:, None]) == pytest.approx(expected, rel=1e-9)


def test_mean_over_draws_is_the_distance_of_two_gaussians_in_one_dimension():
    rng = np.random.default_rng(1)
    expected = 2 * quad(lambda x: (norm.cdf(x) - norm.cdf(x, 1, 2)) ** 2, -20, 20)[0]
    mean, standard_error = mean_of_draws(
        lambda: rng.normal(size=(12, 1)), lambda: rng.normal(1, 2, size=(9, 1))
    )
    assert mean == pytest.approx(expected, abs=3 * standard_error)
    assert standard_error < 0.1 * expected


def test_mean_over_draws_is_the_distance_of_two_gaussians_in_two_dimensions():
    # The norm of an isotropic 2-D Gaussian of deviation s has mean s sqrt(pi / 2).
    rng = np.random.default_rng(2)
    expected = np.sqrt(np.pi / 2) * (2 * np.sqrt(1 + 9) - np.sqrt(2) - 3 * np.sqrt(2))
    mean, standard_error = mean_of_draws(
        lambda: rng.normal(size=(12, 2)), lambda: 3 * rng.normal(size=(9, 2))
    )
    assert mean == pytest.approx(expected, abs=3 * standard_error)
    assert standard_error < 0.1 * expected


def test_mean_over_draws_of_one_distribution_is_zero():
    rng = np.random.default_rng(3)
    mean, standard_error = mean_of_draws(
        lambda: rng.normal(size=(8, 2)), lambda: rng.normal(size=(8, 2))
    )
    assert abs(mean) < 3 * standard_error


def test_behaviour_under_shift_scale_rotation_and_order():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(600, 2)), rng.normal(size=(90, 2)) + 1
    rotation = np.linalg.qr(rng.normal(size=(2, 2)))[0]
    distance = energy_distance(a, b)
    assert energy_distance(b, a) == pytest.approx(distance)
    assert energy_distance(3 * a, 3 * b) == pytest.approx(3 * distance)
    assert energy_distance(a @ rotation + 7, b @ rotation + 7) == pytest.approx(distance)
    assert energy_distance(rng.permutation(a), b[::-1]) == pytest.approx(distance)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((4, 2)), np.zeros((4, 3)), "same dimension, got 2 and 3"),
        (np.zeros((1, 2)), np.zeros((4, 2)), "at least 2 rows, got 1"),
        (np.zeros((4, 2)), np.zeros((1, 2)), "at least 2 rows, got 1"),
        (np.full((4, 2), np.inf), np.zeros((4, 2)), "NaN or infinity"),
        (np.zeros(4), np.zeros((4, 1)), "shape"),
    ],
)
def test_input_that_cannot_be_compared(a, b, message):
    with pytest.raises(UserError, match=message):
        energy_distance(a, b)
