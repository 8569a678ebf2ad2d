"""Halving targets in float32 against two DDIM steps and a linear solve in NumPy's float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from guided_distill.diffusion import process, schedules
from guided_distill.diffusion.guidance import Denoiser, with_clipping
from guided_distill.objectives import halving

MIX = 0.5 * np.random.default_rng(0).standard_normal((3, 3))


def cosine(t):
    end = np.arctan(np.exp(-10.0))
    angle = end + (0.5 * np.pi - 2.0 * end) * t
    return -2.0 * np.log(np.tan(angle))


def chain(betas):
    alpha_bar = np.cumprod(1.0 - betas)
    values = np.concatenate([[20.0], np.log(alpha_bar / (1.0 - alpha_bar))])
    return lambda t: values[np.round(1000 * t).astype(int)]


SCHEDULES = {
    "cosine": (schedules.cosine(), cosine),
    "linear": (schedules.linear(), chain(np.linspace(1e-4, 0.02, 1000))),
    "scaled_linear": (
        schedules.scaled_linear(),
        chain(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2),
    ),
}
TIMES = {
    "ddim": lambda i, n: (i / n, (i - 0.5) / n, (i - 1) / n),
    "stochastic": lambda i, n: (i / n, (i - 1) / n, np.maximum(i - 2, 0) / n),
    "encode": lambda i, n: ((i - 1) / n, (i - 0.5) / n, i / n),
}


def network(module, z, t):
    return module.tanh(z @ MIX.astype(z.dtype) + t[:, None])


def levels(log_snr):
    alpha_squared = 1.0 / (1.0 + np.exp(-log_snr))
    return np.sqrt(alpha_squared)[:, None], np.sqrt(1.0 - alpha_squared)[:, None]


def solved(schedule, z, times, clipped):
    """x, eps and v [B, D] such that one DDIM step goes where the teacher's one or two steps go."""
    t, half, end = times

    def predict(z, t):
        alpha, sigma = levels(schedule(t))
        v = network(np, z, t)
        x, eps = alpha * z - sigma * v, sigma * z + alpha * v
        inside = np.clip(x, -1.0, 1.0) if clipped else x
        return inside, np.where(inside == x, eps, (z - alpha * inside) / sigma)

    def clean_at_0(t):
        return (
            np.where(t[:, None] == 0.0, *pair)
            for pair in zip((1, 0), levels(schedule(t)), strict=True)
        )

    def step(prediction, s):
        alpha, sigma = clean_at_0(s)
        return alpha * prediction[0] + sigma * prediction[1]

    z_half = step(predict(z, t), half)
    z_end = np.where(half[:, None] == end[:, None], z_half, step(predict(z_half, half), end))
    (alpha, sigma), (alpha_end, sigma_end) = levels(schedule(t)), clean_at_0(end)
    matrix = np.concatenate([alpha, sigma, alpha_end, sigma_end], axis=1).reshape(-1, 1, 2, 2)
    x, eps = np.moveaxis(
        np.linalg.solve(matrix, np.stack([z, z_end], -1)[..., None])[..., 0], -1, 0
    )
    return x, eps, alpha * eps - sigma * x


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("sampler", halving.JUMPS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_targets_agree_to_1e_6_from_1_step_to_512(name, sampler, clipped):
    schedule, exact_schedule = SCHEDULES[name]
    z = np.random.default_rng(1).standard_normal((512, 3)).astype(np.float32)

    def predict(z, t, condition, w):
        v = network(jnp, z, t)
        return process.prediction_from(v, source="v", z=z, log_snr=schedule(t))

    teacher = Denoiser(predict, guided=True, null=None)
    if clipped:
        teacher = with_clipping(teacher, schedule)
    # A chain has a noise level for each of a teacher's steps up to 1000.
    finest = 512 if name == "cosine" or sampler == "stochastic" else 500
    for num_steps in (1, 2, 3, 8, 61, 256, finest):
        i = np.arange(512) % num_steps + 1
        jump = halving.JUMPS[sampler](jnp.asarray(i), num_steps)
        found = halving.halving_target(teacher, z, {}, None, jump=jump, schedule=schedule)
        times = TIMES[sampler](i, num_steps)
        x, eps, v = solved(exact_schedule, z.astype(np.float64), times, clipped)
        np.testing.assert_allclose(found.x, x, atol=1e-6)
        if clipped:
            assert np.abs(found.x).max() <= 1.0
        else:
            np.testing.assert_allclose(found.eps, eps, atol=1e-6)
            np.testing.assert_allclose(process.velocity(found, schedule(jump.t)), v, atol=1e-6)
