"""Continuous-time consistency distillation against a flow that is known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from guided_distill import draws
from guided_distill.config import parse
from guided_distill.diffusion.guidance import Denoiser
from guided_distill.diffusion.process import Prediction, broadcast_to_rank, levels
from guided_distill.diffusion.schedules import SCHEDULES
from guided_distill.errors import UserError
from guided_distill.objectives.continuous import Continuous, continuous_loss, tangent
from guided_distill.objectives.stage import Examples

SCHEDULE = SCHEDULES["cosine"]()
WIDTH = 0.3
"""The standard deviation of Gaussian data."""


def predicting(x_of):
    """A denoiser of one prediction of x, x_of(z, alpha, sigma, w)."""

    def predict(z, t, condition, w):
        alpha, sigma = levels(SCHEDULE(t), z)
        x = x_of(z, alpha, sigma, w)
        return Prediction(x, (z - alpha * x) / sigma)

    return Denoiser(predict, guided=True, null=None)


def deviation(alpha, sigma):
    return jnp.hypot(alpha * WIDTH, sigma)


TEACHER = predicting(lambda z, a, s, w: a * WIDTH**2 * z / deviation(a, s) ** 2)
EXACT = predicting(lambda z, a, s, w: WIDTH * z / deviation(a, s))
"""The consistency function of Gaussian data: z/deviation doesn't change along the flow."""


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def points(count=50):
    t = jnp.linspace(0.02, 0.98, count)
    return jnp.asarray(np.random.default_rng(0).normal(size=(count, 2))), t


def test_the_tangent_vanishes_at_the_exact_consistency_function(float64):
    z, t = points()
    terms = tangent(EXACT, TEACHER, z, t, {}, None, schedule=SCHEDULE)
    assert np.abs(terms[0]).max() > 0.1, "the terms cancel, though neither is zero"
    np.testing.assert_allclose(sum(terms), 0, atol=1e-9)


def test_the_tangent_is_the_students_change_along_the_teachers_path(float64):
    wrong = predicting(lambda z, a, s, w: 0.5 * z * a + 0.1 * jnp.sin(3 * z) * s)
    z, t = points()
    h = 1e-5

    def along(step):
        alpha, sigma = levels(SCHEDULE(t + step), z)
        alpha_t, sigma_t = levels(SCHEDULE(t), z)
        moved = z * deviation(alpha, sigma) / deviation(alpha_t, sigma_t)
        return wrong.predict(moved, t + step, {}, None).x

    alpha, _ = levels(SCHEDULE(t), z)
    phi = jnp.arctan(jnp.exp(-0.5 * SCHEDULE(t + h))) - jnp.arctan(jnp.exp(-0.5 * SCHEDULE(t - h)))
    expected = alpha * (along(h) - along(-h)) / broadcast_to_rank(phi, z)
    found = sum(tangent(wrong, TEACHER, z, t, {}, None, schedule=SCHEDULE))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def slope_of_loss(share, *, update=0, settings=None):
    """The derivative of the mean loss by the teacher's share in a student that mixes it with EXACT."""
    keys = jax.random.split(jax.random.key(0), 256)
    x = WIDTH * draws.normals(keys, (2,))

    def loss(share):
        student = predicting(
            lambda z, a, s, w: (
                z
                * (
                    share * a * WIDTH**2 / deviation(a, s) ** 2
                    + (1 - share) * WIDTH / deviation(a, s)
                )
            )
        )
        return continuous_loss(
            student,
            TEACHER,
            Examples(x, {}, keys),
            schedule=SCHEDULE,
            settings=settings or Continuous(tangent_warmup=0.0),
            w_range=(0.0, 1.0),
            update=update,
        ).per_example.mean()

    return float(jax.grad(loss)(jnp.float32(share)))


def test_the_second_term_warms_up():
    settings = Continuous(steps=990, tangent_warmup=0.1)
    slopes = [slope_of_loss(0.5, update=update, settings=settings) for update in (0, 50, 99, 500)]
    assert slopes[2] == slopes[3] == pytest.approx(slope_of_loss(0.5), rel=1e-5)
    assert len({round(slope, 6) for slope in slopes[:3]}) == 3


def test_learning_ends_at_the_exact_student():
    assert abs(slope_of_loss(0.0)) < 1e-3
    assert slope_of_loss(1.0) > slope_of_loss(0.5) > 0.01
    assert slope_of_loss(-0.5) < -0.01


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"method": "two_student"},
            "config.second_stage is continuous, whose teacher is stage one",
        ),
        ({"model": {"schedule": "linear"}}, "differentiates in time, but config.model.schedule is"),
        ({"model": {"options": {}}}, "set config.model.options.time_scale to at most 50"),
        (
            {"model": {"options": {"time_scale": 1000.0}}},
            "to at most 50, such as 10, in the teacher",
        ),
        (
            {"model": {"parameterization": "eps"}, "teacher": {"weighting": "snr"}},
            "where eps hardly determines x",
        ),
    ],
)
def test_runs_that_cannot_be_differentiated_are_refused(changes, said):
    smooth = {"model": {"options": {"time_scale": 10.0}}, "second_stage": "continuous"}
    parse(smooth)
    with pytest.raises(UserError) as error:
        parse(smooth | changes)
    assert said in str(error.value)
