"""What each objective asks of its student."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from guided_distill.diffusion import process, samplers, schedules
from guided_distill.diffusion.guidance import Denoiser, with_clipping, with_guidance
from guided_distill.objectives import guidance, halving, teacher, weighting
from guided_distill.objectives.guidance import Guidance
from guided_distill.objectives.halving import Halving
from guided_distill.objectives.stage import Examples
from guided_distill.objectives.teacher import Teacher

SCHEDULES = {
    "cosine": schedules.cosine(),
    "linear": schedules.linear(),
    "scaled_linear": schedules.scaled_linear(),
}


def denoiser(schedule, *, guided, parameterization="v", seed=0):
    """A smooth random function as a network, which depends on z, t, the label and w."""
    mix = jax.random.normal(jax.random.key(seed), (3, 3))

    def predict(z, t, condition, w):
        weight = 0.0 if w is None else w[:, None]
        value = jnp.tanh(z @ mix + t[:, None] + 0.1 * condition["label"][:, None] + 0.3 * weight)
        return process.prediction_from(value, source=parameterization, z=z, log_snr=schedule(t))

    return Denoiser(predict, guided=guided, null=None if guided else {"label": 4})


def batch(size=16):
    return (
        jax.random.normal(jax.random.key(1), (size, 3)),
        {"label": jnp.arange(size) % 4},
        jnp.linspace(0.0, 4.0, size),
    )


def examples(x, condition, seed=0):
    return Examples(x, condition, jax.random.split(jax.random.key(seed), len(x)))


def losses_of(student, model, *, x, condition, schedule, num_steps, sampler="ddim", clipped=False):
    return halving.halving_loss(
        student,
        model,
        examples(x, condition),
        schedule=schedule,
        settings=Halving(weighting="truncated_snr", clipped=clipped),
        w_range=(0.0, 4.0),
        aim=halving.Round(num_steps, sampler),
    ).per_example


def test_weights_on_v_are_those_of_the_table():
    log_snr = np.linspace(-15, 15, 31)
    snr, sigma2 = np.exp(log_snr), 1 / (1 + np.exp(log_snr))
    omega = {"snr": snr, "truncated_snr": np.maximum(snr, 1), "snr_plus_one": 1 + snr}
    for name, function in weighting.WEIGHTINGS.items():
        np.testing.assert_allclose(function(jnp.asarray(log_snr)), omega[name] * sigma2, rtol=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("parameterization", ["x", "eps", "v"])
@pytest.mark.parametrize("sampler", halving.JUMPS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
def test_two_teacher_steps_are_one_student_step(name, parameterization, sampler, num_steps):
    schedule = SCHEDULES[name]
    model = denoiser(schedule, guided=True, parameterization=parameterization)
    z, condition, w = batch()
    i = jnp.arange(16) % num_steps + 1
    jump = halving.JUMPS[sampler](i, num_steps)
    target = halving.halving_target(model, z, condition, w, jump=jump, schedule=schedule)

    first = model.predict(z, jump.t, condition, w)
    z_half = process.ddim_step(first, schedule(jump.half))
    second = model.predict(z_half, jump.half, condition, w)
    z_end = process.ddim_step(second, schedule(jump.end))
    landed = process.ddim_step(target, schedule(jump.end))
    scale = jnp.abs(z_end).max()
    inside = np.asarray(jump.end > 0)
    np.testing.assert_allclose(landed[inside] / scale, z_end[inside] / scale, atol=2e-6)

    # At t = 0 the samplers answer x itself, so the target is the teacher's own last x there.
    one_step = np.asarray((i == 1) & (sampler == "stochastic"))
    np.testing.assert_array_equal(target.x[one_step], first.x[one_step])
    two_steps = ~inside & ~one_step
    np.testing.assert_array_equal(target.x[two_steps], second.x[two_steps])


@pytest.mark.parametrize("sampler", halving.JUMPS)
@pytest.mark.parametrize("num_steps", [1, 2, 8])
def test_a_teacher_whose_two_steps_are_one_has_nothing_to_teach(sampler, num_steps):
    schedule = SCHEDULES["cosine"]
    x, condition, _ = batch()

    def predict(z, t, condition, w):
        constant = jnp.broadcast_to((0.1 * condition["label"] + 0.2 * w)[:, None], z.shape)
        return process.prediction_from(constant, source=known, z=z, log_snr=schedule(t))

    # What is known must be well told by z where the jumps begin: eps at t = 0, x at t = 1.
    known = "eps" if sampler == "encode" else "x"

    model = Denoiser(predict, guided=True, null=None)
    settings = {
        "x": x,
        "condition": condition,
        "schedule": schedule,
        "num_steps": num_steps,
        "sampler": sampler,
    }
    np.testing.assert_allclose(losses_of(model, model, **settings), 0, atol=1e-7)
    assert losses_of(denoiser(schedule, guided=True), model, **settings).min() > 1e-4


@pytest.mark.parametrize(
    ("sampler", "i", "expected"),
    [
        ("ddim", 3, (0.75, 0.625, 0.5)),
        ("ddim", 1, (0.25, 0.125, 0.0)),
        ("stochastic", 3, (0.75, 0.5, 0.25)),
        ("stochastic", 2, (0.5, 0.25, 0.0)),
        ("stochastic", 1, (0.25, 0.0, 0.0)),
        ("encode", 1, (0.0, 0.125, 0.25)),
        ("encode", 4, (0.75, 0.875, 1.0)),
    ],
)
def test_jump_times(sampler, i, expected):
    jump = halving.JUMPS[sampler](jnp.array([i]), 4)
    np.testing.assert_allclose(np.concatenate(jump), expected)


def test_halving_needs_a_guided_teacher_and_guidance_a_plain_one():
    schedule = SCHEDULES["cosine"]
    x, condition, _ = batch()
    plain, guided = (denoiser(schedule, guided=each) for each in (False, True))
    with pytest.raises(ValueError, match="guidance stage first"):
        losses_of(guided, plain, x=x, condition=condition, schedule=schedule, num_steps=4)
    with pytest.raises(ValueError, match="already inside"):
        guidance.guidance_loss(
            guided, guided, examples(x, condition), schedule=schedule, settings=Guidance()
        )


def test_guidance_loss_is_zero_for_the_guided_teacher_itself_alone():
    schedule = SCHEDULES["cosine"]
    x, condition, _ = batch()
    plain = denoiser(schedule, guided=False)
    settings = Guidance(weighting="truncated_snr", w_min=0.0, w_max=4.0)
    losses = [
        guidance.guidance_loss(
            student, plain, examples(x, condition), schedule=schedule, settings=settings
        )
        for student in (with_guidance(plain), denoiser(schedule, guided=True))
    ]
    np.testing.assert_allclose(losses[0].per_example, 0.0, atol=1e-10)
    assert losses[1].per_example.min() > 1e-4


def test_dropping_conditions_puts_null_in_whole_examples_at_its_rate():
    condition = {
        "label": jnp.zeros(20_000, jnp.int32),
        "text": jnp.zeros((20_000, 2, 3)),
        "inpaint": jnp.ones((20_000, 2)),
    }
    null = {"label": 4, "text": jnp.arange(1.0, 7.0).reshape(2, 3)}
    keys = jax.random.split(jax.random.key(0), 20_000)
    found = teacher.drop_conditions(condition, keys, null=null, rate=0.1)
    dropped = found["label"]
    expected = np.where((dropped == 4)[:, None, None], null["text"], 0.0)
    np.testing.assert_array_equal(found["text"], expected)
    np.testing.assert_array_equal(found["inpaint"], condition["inpaint"])
    assert set(np.unique(dropped)) == {0, 4}
    np.testing.assert_allclose((dropped == 4).mean(), 0.1, atol=0.01)


def test_teacher_loss_is_least_for_the_posterior_mean():
    schedule, deviation = SCHEDULES["cosine"], 0.5
    x = deviation * jax.random.normal(jax.random.key(0), (4000, 3))

    def loss(factor):
        def predict(z, t, condition, w):
            log_snr = schedule(t)
            alpha, sigma = process.levels(log_snr, z)
            mean = z * alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
            return process.prediction_from(factor * mean, source="x", z=z, log_snr=log_snr)

        return teacher.teacher_loss(
            Denoiser(predict, guided=False, null={"label": 1}),
            examples(x, {"label": jnp.zeros(4000, jnp.int32)}, seed=1),
            schedule=schedule,
            settings=Teacher(weighting="truncated_snr", label_dropout=0.1),
        ).per_example.mean()

    assert loss(1.0) < min(loss(0.98), loss(1.02))


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_clipped_student_makes_its_teachers_clipped_steps(num_steps):
    """The student that meets the clipped target at every z samples what its teacher samples."""
    schedule = SCHEDULES["cosine"]
    model = denoiser(schedule, guided=True)
    z, condition, w = batch()
    z = 2.0 * z
    keys = samplers.step_keys(jax.random.key(0), jnp.arange(16))
    clipped = with_clipping(model, schedule)

    def student(z, t, condition, w):
        i = jnp.round(t * num_steps).astype(jnp.int32)
        jump = halving.JUMPS["ddim"](i, num_steps)
        return halving.halving_target(clipped, z, condition, w, jump=jump, schedule=schedule)

    def run(predict, steps):
        return samplers.ddim(lambda z, t: predict(z, t, condition, w), schedule, z, keys, steps)

    expected = run(clipped.predict, 2 * num_steps)
    np.testing.assert_allclose(run(student, num_steps), expected, atol=1e-4)
    assert np.abs(expected - run(model.predict, 2 * num_steps)).max() > 0.1

    learner = Denoiser(student, guided=True, null=None)
    settings = {"x": 2.0 * z, "condition": condition, "schedule": schedule, "num_steps": num_steps}
    met, missed = (losses_of(learner, model, clipped=each, **settings) for each in (True, False))
    np.testing.assert_allclose(met, 0.0, atol=1e-8)
    assert missed.max() > 1e-3


def test_clipped_guidance_loss_is_zero_for_the_teacher_as_sampled():
    schedule = SCHEDULES["cosine"]
    x, condition, _ = batch()
    plain = denoiser(schedule, guided=False)
    student = with_clipping(with_guidance(plain), schedule)
    met, missed = (
        guidance.guidance_loss(
            student,
            plain,
            examples(x, condition),
            schedule=schedule,
            settings=Guidance(weighting="snr_plus_one", clipped=clipped),
        ).per_example
        for clipped in (True, False)
    )
    np.testing.assert_allclose(met, 0.0, atol=1e-8)
    assert missed.max() > 1e-3


def test_clipped_error_is_nothing_where_a_sampler_sees_no_difference():
    x = jnp.array([1.5, 1.5, 1.5, -2.0, -2.0, 0.5, 0.5])[:, None]
    student_x = jnp.array([1.0, 3.0, -1.5, -1.2, -0.9, 0.5, 1.5])[:, None]
    log_snr, eps = jnp.zeros(7), jnp.zeros((7, 1))

    def errors(clipped):
        z = process.add_noise(x, eps, log_snr=log_snr)
        pair = [
            process.prediction_from(a, source="x", z=z, log_snr=log_snr) for a in (student_x, x)
        ]
        return weighting.prediction_loss(
            *pair, log_snr=log_snr, weighting="snr_plus_one", clipped=clipped
        ).per_example

    found, plain = errors(clipped=True), errors(clipped=False)
    unseen = np.array([True, True, False, True, False, True, False])
    np.testing.assert_array_equal(found == 0, unseen)
    np.testing.assert_array_equal(found[~unseen], plain[~unseen])
