"""Encoders of Gaussian data, where the exact denoiser and the exact flow to noise are known.

z_t has mean alpha mu and variance alpha^2 s^2 + sigma^2; the flow keeps (z_t - mean) / deviation. So x
goes to z_1 = (x - mu) / s, but for the ends of the schedule.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from guided_distill.diffusion import process, samplers, schedules
from guided_distill.diffusion.guidance import Denoiser
from guided_distill.objectives import halving
from guided_distill.objectives.stage import Examples

SCHEDULE = schedules.cosine()
MEAN, DEVIATION = 0.3, 0.5


def exact(z, t, condition=None, w=None):
    alpha, sigma = process.levels(SCHEDULE(t), z)
    score = (z - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2)
    return process.Prediction(x=MEAN + alpha * DEVIATION**2 * score, eps=sigma * score)


def points():
    return MEAN + DEVIATION * jax.random.normal(jax.random.key(0), (16, 3))


def test_encoding_converges_to_the_closed_form_at_first_order():
    x = points()
    encode = jax.jit(samplers.encode, static_argnums=(0, 1))

    def error(num_steps):
        z = encode(exact, SCHEDULE, x, num_steps)
        return float(jnp.abs(z - (x - MEAN) / DEVIATION).max())

    errors = [error(n) for n in (32, 64, 128, 256)]
    assert errors[-1] < 0.02
    for coarse, fine in itertools.pairwise(errors):
        assert 1.8 < coarse / fine < 2.2


def test_a_round_trip_converges_at_first_order():
    x = points()

    @jax.jit
    def error(num_steps):
        z = samplers.encode(exact, SCHEDULE, x, num_steps)
        return jnp.abs(samplers.ddim(exact, SCHEDULE, z, None, num_steps) - x).max()

    errors = [float(error(n)) for n in (16, 32, 64, 128)]
    assert errors[-1] < 0.05
    for coarse, fine in itertools.pairwise(errors):
        assert 1.7 < coarse / fine < 2.3


def student(teacher, num_steps):
    """The encoder that meets its target at every z exactly."""

    def predict(z, t, condition=None, w=None):
        i = jnp.round(t * num_steps).astype(jnp.int32) + 1
        jump = halving.JUMPS["encode"](i, num_steps)
        tutor = Denoiser(teacher, guided=True, null=None)
        return halving.halving_target(tutor, z, condition, w, jump=jump, schedule=SCHEDULE)

    return predict


@pytest.mark.parametrize("first", [8, 12])
def test_exact_students_encode_as_the_many_step_teacher_that_they_come_from(first):
    x = points()
    many = samplers.encode(exact, SCHEDULE, x, 2 * first)
    predict, num_steps = exact, 2 * first
    while num_steps % 2 == 0:
        num_steps //= 2
        predict = student(predict, num_steps)
        few = samplers.encode(predict, SCHEDULE, x, num_steps)
        np.testing.assert_allclose(few, many, atol=2e-5)
    assert num_steps == {8: 1, 12: 3}[first]
    alone = samplers.encode(exact, SCHEDULE, x, num_steps)
    assert np.abs(alone - many).max() > 0.1


def test_encoders_learn_the_noise_of_pixels_at_the_ends_of_the_range():
    """There x is met whatever eps is, so `clipped` would leave them untaught."""
    x = jnp.where(points() > MEAN, 1.0, -1.0)
    condition = {"label": jnp.zeros(16, jnp.int32)}

    def other(z, t, condition=None, w=None):
        prediction = exact(z, t)
        alpha, sigma = process.levels(SCHEDULE(t), z)
        eps = prediction.eps + 1.0
        return process.Prediction((z - sigma * eps) / alpha, eps)

    learner, tutor = (Denoiser(each, guided=True, null=None) for each in (other, exact))

    def losses(clipped):
        return halving.halving_loss(
            learner,
            tutor,
            Examples(x, condition, jax.random.split(jax.random.key(0), len(x))),
            schedule=SCHEDULE,
            settings=halving.Halving(clipped=clipped),
            w_range=(0.0, 4.0),
            aim=halving.Round(1, "encode"),
        ).per_example

    np.testing.assert_array_equal(losses(True), losses(False))
    assert losses(True).min() > 0.1
