import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from guided_distill.data.mixture import DEFAULT_MIXTURE as MIXTURE

NUM_CLASSES = MIXTURE.num_classes


def density(points, label):
    """Prior density in float64, by scipy."""
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
    """Evidence p(z) and E[x | z] on a grid over where the posterior can be."""
    narrow = 9 * sigma < 1.4 * alpha
    center, half = (z / alpha, 9 * sigma / alpha) if narrow else (np.zeros(2), 1.4)
    side = np.linspace(-half, half, 301)
    x = center + np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1)
    exponent = -np.sum((z - alpha * x) ** 2, axis=-1) / (2 * sigma**2)
    mass = density(x, label) * np.exp(exponent) / (2 * np.pi * sigma**2)
    evidence = mass.sum() * (side[1] - side[0]) ** 2
    return evidence, (mass[..., None] * x).sum((0, 1)) / mass.sum()


def noisy_points(sigma, *, count=5):
    """Points z at one noise level, with labels 0..K (K: any class)."""
    labels = jnp.arange(count) % (NUM_CLASSES + 1)
    sigma = jnp.full(count, sigma, jnp.float32)
    alpha = jnp.sqrt(1 - sigma**2)
    x = MIXTURE.sample(jax.random.key(0), labels % NUM_CLASSES)
    z = alpha[:, None] * x + sigma[:, None] * jax.random.normal(jax.random.key(1), x.shape)
    return z, alpha, sigma, labels


@pytest.mark.parametrize("sigma", [5e-5, 1e-3, 0.03, 0.2, 0.7, 0.99, 1.0])
def test_denoise_and_density_match_integration(sigma):
    batch = noisy_points(sigma)
    mean = jax.jit(MIXTURE.denoise)(*batch)
    log_density = jax.jit(MIXTURE.log_density)(*batch)
    for i in range(len(mean)):
        evidence, expected = integrate(*(np.asarray(part[i], np.float64) for part in batch))
        np.testing.assert_allclose(mean[i], expected, atol=5e-7, rtol=0)
        np.testing.assert_allclose(log_density[i], np.log(evidence), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("sigma", [0.1, 0.4, 0.9])
def test_denoise_obeys_tweedie(sigma):
    z, alpha, sigma, labels = noisy_points(sigma, count=50)
    score = jax.grad(lambda z: MIXTURE.log_density(z, alpha, sigma, labels).sum())(z)
    expected = (z + (sigma**2)[:, None] * score) / alpha[:, None]
    np.testing.assert_allclose(MIXTURE.denoise(z, alpha, sigma, labels), expected, atol=3e-6)


def test_denoise_has_the_right_limits():
    z, _, _, labels = noisy_points(0.5, count=10)
    nothing, everything = jnp.zeros(10), jnp.ones(10)
    class_means = np.einsum("km,kmd->kd", MIXTURE.weights, MIXTURE.means)
    prior_means = np.concatenate([class_means, class_means.mean(0, keepdims=True)])
    np.testing.assert_allclose(
        MIXTURE.denoise(z, nothing, everything, labels), prior_means[labels], atol=1e-6
    )
    np.testing.assert_allclose(
        MIXTURE.denoise(z, everything, jnp.full(10, 5e-5), labels), z, atol=1e-6
    )


def test_denoise_stays_finite_far_from_the_data():
    z = jnp.array([[40.0, -30.0], [0.0, 0.0], [-9.0, 2.0]])
    alpha, sigma = jnp.ones(3), jnp.full(3, 5e-5)
    for label in (0, NUM_CLASSES):
        assert np.isfinite(MIXTURE.denoise(z, alpha, sigma, jnp.full(3, label))).all()


def test_samples_have_the_moments_of_their_class():
    labels = jnp.repeat(jnp.arange(NUM_CLASSES), 20_000)
    points = np.asarray(MIXTURE.sample(jax.random.key(3), labels)).reshape(NUM_CLASSES, -1, 2)
    for c in range(NUM_CLASSES):
        weights, means, stds = MIXTURE.weights[c], MIXTURE.means[c], MIXTURE.stds[c]
        mean = weights @ means
        spread = (weights[:, None] * (means - mean)).T @ (means - mean)
        covariance = spread + (weights @ stds**2) * np.eye(2)
        np.testing.assert_allclose(points[c].mean(0), mean, atol=0.01)
        np.testing.assert_allclose(np.cov(points[c].T), covariance, atol=0.003)


def test_classes_overlap_but_can_be_told_apart():
    z, alpha, sigma, _ = noisy_points(1e-3, count=4000)
    labels = jnp.arange(4000) % NUM_CLASSES
    z = MIXTURE.sample(jax.random.key(5), labels)
    by_class = jnp.stack(
        [MIXTURE.log_density(z, alpha, sigma, jnp.full(4000, c)) for c in range(NUM_CLASSES)]
    )
    accuracy = float(np.mean(by_class.argmax(0) == labels))
    assert 0.85 < accuracy < 0.99
    assert np.abs(z).max() < 1.1
