import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from guided_distill.data.mixture import DEFAULT_MIXTURE as MIXTURE

NUM_CLASSES = MIXTURE.num_classes
PER_CLASS = 20_000
denoise = jax.jit(MIXTURE.denoise)
log_density = jax.jit(MIXTURE.log_density)


@pytest.fixture(scope="module")
def samples():
    """Clean points [K, PER_CLASS, 2]."""
    labels = jnp.repeat(jnp.arange(NUM_CLASSES), PER_CLASS)
    points = MIXTURE.sample(jax.random.key(3), labels)
    return np.asarray(points).reshape(NUM_CLASSES, PER_CLASS, 2)


@pytest.fixture
def noisy(samples):
    """Makes (z, alpha, sigma, label) for 50 points at a noise level, labels 0..K (K: any class)."""

    def at(level):
        rng = np.random.default_rng(0)
        labels = np.arange(50) % (NUM_CLASSES + 1)
        sigma = np.full(50, level, np.float32)
        alpha = np.sqrt(1 - sigma**2)
        x = samples[labels % NUM_CLASSES, np.arange(50)]
        z = alpha[:, None] * x + sigma[:, None] * rng.standard_normal((50, 2), np.float32)
        return z, alpha, sigma, labels

    return at


def prior_density(points, label):
    """The density of clean points in float64, computed by scipy."""
    classes = range(NUM_CLASSES) if label == NUM_CLASSES else [label]
    total = 0.0
    for c in classes:
        for mean, std, weight in zip(
            MIXTURE.means[c], MIXTURE.stds[c], MIXTURE.weights[c], strict=True
        ):
            normal = multivariate_normal(np.float64(mean), np.float64(std) ** 2)
            total = total + np.float64(weight) * normal.pdf(points) / len(classes)
    return total


def integrate(z, alpha, sigma, label):
    """The evidence p(z) and E[x | z], integrated on a grid that covers the posterior."""
    narrow = 9 * sigma < 1.4 * alpha
    center, half = (z / alpha, 9 * sigma / alpha) if narrow else (np.zeros(2), 1.4)
    side = np.linspace(-half, half, 301)
    x = center + np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1)
    exponent = -np.sum((z - alpha * x) ** 2, axis=-1) / (2 * sigma**2)
    mass = prior_density(x, label) * np.exp(exponent) / (2 * np.pi * sigma**2)
    evidence = mass.sum() * (side[1] - side[0]) ** 2
    return evidence, (mass[..., None] * x).sum((0, 1)) / mass.sum()


@pytest.mark.parametrize("sigma", [5e-5, 1e-3, 0.03, 0.2, 0.7, 0.99, 1.0])
def test_denoise_and_density_match_integration(noisy, sigma):
    batch = noisy(sigma)
    mean, log_evidence = denoise(*batch), log_density(*batch)
    for i in range(NUM_CLASSES + 1):
        *point, label = (part[i] for part in batch)
        evidence, expected = integrate(*(value.astype(np.float64) for value in point), label)
        np.testing.assert_allclose(mean[i], expected, atol=5e-7, rtol=0)
        np.testing.assert_allclose(log_evidence[i], np.log(evidence), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("sigma", [0.1, 0.4, 0.9])
def test_denoise_obeys_tweedie(noisy, sigma):
    z, alpha, sigma, labels = noisy(sigma)
    score = jax.grad(lambda z: log_density(z, alpha, sigma, labels).sum())(z)
    expected = (z + (sigma**2)[:, None] * score) / alpha[:, None]
    np.testing.assert_allclose(denoise(z, alpha, sigma, labels), expected, atol=3e-6)


def test_denoise_has_the_right_limits(noisy):
    z, _, _, labels = noisy(0.5)
    nothing, everything, little = np.float32([0, 1, 5e-5])[:, None].repeat(50, axis=1)
    class_means = np.einsum("km,kmd->kd", MIXTURE.weights, MIXTURE.means)
    prior_means = np.concatenate([class_means, class_means.mean(0, keepdims=True)])
    pure_noise = denoise(z, nothing, everything, labels)
    np.testing.assert_allclose(pure_noise, prior_means[labels], atol=1e-6)
    # Where the prior's density is not negligible, a tiny sigma hardly moves z.
    z, _, _, labels = noisy(5e-5)
    np.testing.assert_allclose(denoise(z, everything, little, labels), z, atol=1e-6)


def test_denoise_stays_finite_far_from_the_data(noisy):
    z, alpha, sigma, labels = noisy(5e-5)
    assert np.isfinite(denoise(50 * z, alpha, sigma, labels)).all()


def test_samples_have_the_moments_of_their_class(samples):
    for c, points in enumerate(samples):
        weights, means, stds = MIXTURE.weights[c], MIXTURE.means[c], MIXTURE.stds[c]
        mean = weights @ means
        spread = (weights[:, None] * (means - mean)).T @ (means - mean)
        covariance = spread + (weights @ stds**2) * np.eye(2)
        np.testing.assert_allclose(points.mean(0), mean, atol=0.01)
        np.testing.assert_allclose(np.cov(points.T), covariance, atol=0.003)


def test_classes_overlap_but_can_be_distinguished(samples):
    points = samples[:, :500]
    by_class = [prior_density(points, label) for label in range(NUM_CLASSES)]
    guess = np.argmax(by_class, axis=0)
    accuracy = np.mean(guess == np.arange(NUM_CLASSES)[:, None])
    assert 0.85 < accuracy < 0.99
    assert np.abs(points).max() < 1.1
