"""Schedules, samplers and halving targets in float32 against NumPy's float64, written from the papers.

Each step of a sampler starts from the float32 z that it was given: what differs is the step's own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from guided_distill.diffusion import process, samplers, schedules
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


def clean_at_0(schedule, t):
    """alpha and sigma [B, 1] that a step to t lands on: samplers return x itself at t = 0."""
    return (
        np.where(t[:, None] == 0, *pair) for pair in zip((1, 0), levels(schedule(t)), strict=True)
    )


def teacher_at(schedule, z, t, clipped=False):
    """x and eps [B, D] in float64."""
    alpha, sigma = levels(schedule(t))
    v = network(np, z, t)
    x, eps = alpha * z - sigma * v, sigma * z + alpha * v
    inside = np.clip(x, -1.0, 1.0) if clipped else x
    return inside, np.where(inside == x, eps, (z - alpha * inside) / sigma)


def ddim(schedule, prediction, s):
    alpha, sigma = clean_at_0(schedule, s)
    return alpha * prediction[0] + sigma * prediction[1]


def two_steps(schedule, z, times, clipped=False):
    """Where the teacher's steps go from z [B, D]; only one where the second has no length."""
    t, half, end = times
    z_half = ddim(schedule, teacher_at(schedule, z, t, clipped), half)
    z_end = ddim(schedule, teacher_at(schedule, z_half, half, clipped), end)
    return np.where(half[:, None] == end[:, None], z_half, z_end)


def solved(schedule, z, times, clipped):
    """x, eps and v [B, D] such that one DDIM step goes where the teacher's one or two steps go."""
    z_end = two_steps(schedule, z, times, clipped)
    (alpha, sigma), (alpha_end, sigma_end) = (
        levels(schedule(times[0])),
        clean_at_0(schedule, times[2]),
    )
    matrix = np.concatenate([alpha, sigma, alpha_end, sigma_end], axis=1).reshape(-1, 1, 2, 2)
    x, eps = np.moveaxis(
        np.linalg.solve(matrix, np.stack([z, z_end], -1)[..., None])[..., 0], -1, 0
    )
    return x, eps, alpha * eps - sigma * x


def predict_by(schedule):
    def predict(z, t, condition=None, w=None):
        return process.prediction_from(network(jnp, z, t), source="v", z=z, log_snr=schedule(t))

    return predict


def back_by_noise(schedule, z, end, s, noise):
    """Of z at `end`, the noisier s by (5)."""
    (alpha, sigma), (alpha_s, sigma_s) = clean_at_0(schedule, end), clean_at_0(schedule, s)
    ratio = alpha_s / alpha
    return ratio * z + np.sqrt(np.maximum(sigma_s**2 - ratio**2 * sigma**2, 0.0)) * noise


def ancestral_step(schedule, z, t, s, noise):
    x, _ = teacher_at(schedule, z, t)
    (alpha, sigma), (alpha_s, sigma_s) = levels(schedule(t)), clean_at_0(schedule, s)
    ratio = alpha / alpha_s
    added = sigma**2 - ratio**2 * sigma_s**2
    mean = ratio * sigma_s**2 / sigma**2 * z + alpha_s * added / sigma**2 * x
    return mean + np.sqrt(added) * sigma_s / sigma * noise


def solver_step(schedule, z, t, s):
    """All steps [N] of DPM-Solver++(2M) at once, each from its own z [N, B, D] and the one before."""
    x = np.stack(
        [
            teacher_at(schedule, each, np.full(len(each), at))[0]
            for each, at in zip(z, t, strict=True)
        ]
    )
    half = 0.5 * schedule(t)
    h = np.where(s == 0, np.inf, 0.5 * schedule(s) - half)
    slope = np.zeros(len(t))
    slope[1:-1] = h[1:-1] / (2 * h[:-2])
    data = x + slope[:, None, None] * (x - np.concatenate([x[:1], x[:-1]]))
    (_, sigma), (alpha_s, sigma_s) = levels(schedule(t)), clean_at_0(schedule, s)
    shapes = [each[..., None] for each in (sigma_s / sigma, alpha_s * np.expm1(-h)[:, None])]
    return shapes[0] * z - shapes[1] * data


def steps_of(sampler, schedule, z, num_steps, noise):
    """Where each step ends [N, B, D], from z [N, B, D] at t = 1, ... 1/N."""
    i = np.arange(num_steps, 0, -1)
    # Times are float32 to the network too.
    t, mid, s, end = (
        np.float64(np.float32(np.maximum(i - k, 0) / num_steps)) for k in (0, 0.5, 1, 2)
    )
    if sampler == "dpm_solver_pp":
        return solver_step(schedule, z, t, s)
    found = []
    for k, each in enumerate(z):
        at, half, to, beyond = (np.full(len(each), times[k]) for times in (t, mid, s, end))
        if sampler == "ancestral":
            found.append(ancestral_step(schedule, each, at, to, noise))
        elif sampler == "ddim":
            found.append(ddim(schedule, teacher_at(schedule, each, at), to))
        elif sampler == "stochastic":
            jumped = ddim(schedule, teacher_at(schedule, each, at), beyond)
            found.append(back_by_noise(schedule, jumped, beyond, to, noise))
        elif sampler == "student of ddim":
            found.append(two_steps(schedule, each, (at, half, to)))
        else:
            jumped = two_steps(schedule, each, (at, to, beyond))
            found.append(back_by_noise(schedule, jumped, beyond, to, noise))
    return np.stack(found)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_agree_to_a_few_last_digits(name):
    schedule, exact_schedule = SCHEDULES[name]
    t = np.arange(1001) / 1000
    np.testing.assert_allclose(
        schedule(jnp.asarray(t, jnp.float32)), exact_schedule(t), rtol=3e-6, atol=3e-6
    )


NOISY = ("ancestral", "stochastic", "student of stochastic")


@pytest.mark.parametrize(
    ("sampler", "noise"),
    [
        *((name, 0.0) for name in (*samplers.SAMPLERS, "student of ddim", "student of stochastic")),
        *((name, 1.0) for name in NOISY),
    ],
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_agree_to_1e_6_from_1_step_to_512(name, sampler, noise, monkeypatch):
    schedule, exact_schedule = SCHEDULES[name]
    monkeypatch.setattr(samplers, "_step_noise", lambda keys, i, z: jnp.full_like(z, noise))
    kind = sampler.removeprefix("student of ")
    recorded = []

    def predict(z, t, num_steps):
        io_callback(lambda z: recorded.append(np.asarray(z)), None, z, ordered=True)
        if kind == sampler:
            return predict_by(schedule)(z, t)
        i = jnp.round(t * num_steps)
        return halving.halving_target(
            Denoiser(predict_by(schedule), guided=True, null=None),
            z,
            {},
            None,
            jump=halving.JUMPS[kind](i, num_steps),
            schedule=schedule,
        )

    @jax.jit
    def run(z, num_steps):
        return samplers.SAMPLERS[kind](
            lambda z, t: predict(z, t, num_steps), schedule, z, None, num_steps
        )

    start = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
    for num_steps in (1, 2, 3, 8, 61, 500 if sampler == "student of ddim" else 512):
        recorded.clear()
        last = np.asarray(run(start, jnp.int32(num_steps)))
        jax.effects_barrier()
        z = np.stack([*recorded, last]).astype(np.float64)
        expected = steps_of(sampler, exact_schedule, z[:-1], num_steps, noise)
        scale = np.maximum(np.abs(expected), 1.0)
        # The deviation of a step's noise is the root of a difference of two float32 log-SNRs.
        atol = 2e-6 if noise else 1e-6
        np.testing.assert_allclose(z[1:] / scale, expected / scale, atol=atol, rtol=0)


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("sampler", halving.JUMPS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_targets_agree_to_1e_6_from_1_step_to_512(name, sampler, clipped):
    schedule, exact_schedule = SCHEDULES[name]
    z = np.random.default_rng(1).standard_normal((512, 3)).astype(np.float32)
    teacher = Denoiser(predict_by(schedule), guided=True, null=None)
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
