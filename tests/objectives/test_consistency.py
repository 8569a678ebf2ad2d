"""Multistep consistency distillation against flows that are known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from guided_distill import draws
from guided_distill.config import parse
from guided_distill.diffusion.guidance import Denoiser
from guided_distill.diffusion.process import Prediction, ddim_step, levels
from guided_distill.diffusion.schedules import SCHEDULES, arrival
from guided_distill.errors import UserError
from guided_distill.objectives.consistency import (
    Consistency,
    consistency_loss,
    jump_of,
    teacher_steps_per_segment,
)
from guided_distill.objectives.halving import JUMPS, Jump, halving_target
from guided_distill.objectives.stage import Examples

SCHEDULE = SCHEDULES["cosine"]()
WIDTH = 0.3
"""The standard deviation of Gaussian data, and of both components of a mixture at -1 and 1."""


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def levels_at(t):
    log_snr = arrival(SCHEDULE, t)
    return tuple(map(np.asarray, levels(log_snr, log_snr)))


def landing(z, t, z_end, end):
    """The prediction at z whose DDIM step from t to `end` is z_end."""
    (a, b), (c, d) = levels_at(t), levels_at(end)
    x = (b * z_end - d * z) / (b * c - d * a)
    return Prediction(jnp.asarray(x), jnp.asarray((z - a * x) / b))


def gaussian_flow(z, t, end):
    """The probability flow of Gaussian data from t to `end`."""
    (a, b), (c, d) = levels_at(t), levels_at(end)
    return z * np.hypot(c * WIDTH, d) / np.hypot(a * WIDTH, b)


def mixture_flow(z, t, end):
    """The flow of the mixture, which in one dimension keeps quantiles."""

    def quantile(z, t):
        a, b = levels_at(t)
        return norm.cdf((z + np.array([-a, a])) / np.hypot(a * WIDTH, b)).mean()

    def moved(z, t, end):
        own = quantile(z, t)
        return brentq(lambda y: quantile(y, end) - own, -9, 9, xtol=1e-15)

    return np.vectorize(moved)(z, t, end)


def mixture_denoiser():
    """The exact denoiser of the mixture."""

    def predict(z, t, condition, w):
        a, b = (jnp.asarray(each) for each in levels_at(t))
        variance = (a * WIDTH) ** 2 + b**2
        share = jax.nn.sigmoid(2 * a * z / variance)
        x = sum(
            weight * (m + a * WIDTH**2 * (z - a * m) / variance)
            for m, weight in ((1, share), (-1, 1 - share))
        )
        return Prediction(x, (z - a * x) / b)

    return Denoiser(predict, guided=True, null=None)


def exact(flow, end_of):
    """A denoiser whose step from t to end_of(t) is the exact flow."""

    def predict(z, t, condition, w):
        # At t = 0, which is no start of a step, a prediction is finite and has no effect.
        t = np.where(t > 0, t, 1.0)
        end = end_of(t)
        return landing(z, t, flow(np.asarray(z), t, end), end)

    return Denoiser(predict, guided=True, null=None)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_the_exact_student_is_a_fixed_point(float64, num_steps):
    per_segment = 8
    fine = per_segment * num_steps
    place = np.arange(1, fine + 1)
    jump = jump_of(
        (place - 1) // per_segment,
        (place - 1) % per_segment + 1,
        steps=per_segment,
        num_steps=num_steps,
    )
    z = np.random.default_rng(0).normal(size=fine)
    student = exact(gaussian_flow, lambda t: np.ceil(t * num_steps - 1e-9 - 1) / num_steps)
    teacher = exact(gaussian_flow, lambda t: (np.round(t * fine) - 1) / fine)
    target = halving_target(teacher, z, {}, None, jump=jump, schedule=SCHEDULE, second=student)
    own = student.predict(z, jump.t, {}, None)
    np.testing.assert_allclose(target.x, own.x, atol=1e-12)
    np.testing.assert_allclose(target.eps, own.eps, atol=1e-12)


def test_the_bias_of_a_target_falls_with_the_square_of_the_teachers_step(float64):
    z = np.random.default_rng(1).normal(size=64)
    t, end = np.full(64, 0.5), np.full(64, 0.25)
    truth = mixture_flow(z, t, end)
    student = exact(mixture_flow, lambda t: end)
    biases = []
    for k in (64, 256, 1280):
        jump = Jump(t, t - 1 / k, end)
        target = halving_target(
            mixture_denoiser(), z, {}, None, jump=jump, schedule=SCHEDULE, second=student
        )
        landed = ddim_step(target, arrival(SCHEDULE, end))
        biases.append(np.sqrt(np.mean((landed - truth) ** 2)))
    assert biases[0] > 1e-5, "a bias to measure"
    assert biases[0] / biases[1] == pytest.approx(16, rel=0.2)
    assert biases[1] / biases[2] == pytest.approx(25, rel=0.2)


def test_two_teacher_steps_a_segment_begin_with_the_jump_of_step_halving():
    segment = jnp.arange(4)
    jump = jump_of(segment, jnp.full(4, 2), steps=2, num_steps=4)
    np.testing.assert_array_equal(jump, JUMPS["ddim"](segment + 1.0, 4))


@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_times_stay_in_their_segment(num_steps):
    segment, step = np.divmod(np.arange(num_steps * 5), 5)
    jump = jump_of(segment, step + 1, steps=5, num_steps=num_steps)
    assert np.all((jump.half >= jump.end - 1e-7) & (jump.t <= jump.end + 1 / num_steps + 1e-7))
    np.testing.assert_allclose(jump.t - jump.half, 1 / 5 / num_steps, rtol=1e-5)
    assert jump.t.max() == 1
    assert jump.half.min() == jump.end.min() == 0


def test_the_teachers_steps_rise_log_linearly():
    settings = Consistency(steps=1000, first_teacher_num_steps=64, last_teacher_num_steps=1024)
    found = [int(teacher_steps_per_segment(settings, n, 4)) for n in (0, 250, 500, 750, 1000, 2000)]
    assert found == [16, 32, 64, 128, 256, 256]


def test_the_loss_is_a_distance_between_predictions():
    teacher = mixture_denoiser()
    keys = jax.random.split(jax.random.key(0), 512)
    x = draws.normals(keys, ())

    def loss(student, huber):
        return consistency_loss(
            student,
            teacher,
            Examples(x, {}, keys),
            schedule=SCHEDULE,
            settings=Consistency(huber=huber),
            w_range=(0.0, 1.0),
            grid=(16, 2),
        )

    def shifted(z, t, condition, w):
        prediction = teacher.predict(z, t, condition, w)
        return Prediction(prediction.x + 0.1, prediction.eps)

    with np.errstate(all="ignore"):
        unsquared = loss(Denoiser(shifted, guided=True, null=None), 1e-6)
        squared = loss(Denoiser(shifted, guided=True, null=None), 1e3)
    error = np.asarray(unsquared.aux["v_error"])
    np.testing.assert_allclose(unsquared.per_example, np.sqrt(error), atol=1e-5)
    np.testing.assert_allclose(squared.per_example, error / 2e3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "naive"}, "config.second_stage is consistency, whose teacher is stage one"),
        ({"consistency": {"num_steps": ()}}, "config.consistency.num_steps is ()"),
        ({"consistency": {"num_steps": (4, 4)}}, "each once"),
        ({"consistency": {"num_steps": (64,)}}, "at least twice the largest of num_steps, 64"),
        (
            {"consistency": {"last_teacher_num_steps": 32}},
            "at most last_teacher_num_steps, 32",
        ),
        (
            {"model": {"schedule": "scaled_linear"}},
            "config.consistency.last_teacher_num_steps is 1280, but config.model.schedule is",
        ),
        (
            {"consistency": {"weighting": "snr"}},
            "config.consistency.num_steps holds 1, but config.consistency.weighting is snr",
        ),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(changes, said):
    with pytest.raises(UserError) as error:
        parse({"second_stage": "consistency", **changes})
    assert said in str(error.value)
    parse(changes | {"second_stage": "halving"} if "consistency" in changes else {})
