"""The process, compared with its definition and with Gaussian data, whose exact denoiser is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from guided_distill.diffusion import process, samplers, schedules
from guided_distill.diffusion.guidance import (
    Denoiser,
    combine,
    guidance_scale,
    weight_from_guidance_scale,
    with_guidance,
)

SCHEDULES = {
    "cosine": schedules.cosine(),
    "linear": schedules.linear(),
    "scaled_linear": schedules.scaled_linear(),
    "shifted": schedules.shifted(schedules.cosine(), 4.0),
}
DEVIATION = 0.5
NAMES = ("x", "eps", "v")


def draw(seed, shape=(6, 3)):
    return jax.random.normal(jax.random.key(seed), shape)


def gaussian_predict(schedule, deviation=DEVIATION):
    """Return the exact denoiser for data N(0, deviation^2)."""

    def predict(z, t):
        log_snr = schedule(t)
        alpha, sigma = process.levels(log_snr, z)
        variance = alpha**2 * deviation**2 + sigma**2
        return process.Prediction(x=z * alpha * deviation**2 / variance, eps=z * sigma / variance)

    return predict


def test_cosine_is_the_cosine_inside_and_truncated_at_the_ends():
    t = jnp.linspace(0.05, 0.95, 19)
    alpha, sigma = schedules.alpha_sigma(schedules.cosine()(t))
    np.testing.assert_allclose(alpha, np.cos(0.5 * np.pi * t), atol=2e-4)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-6)
    np.testing.assert_allclose(schedules.cosine()(jnp.array([0.0, 1.0])), [20, -20], rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_log_snr_falls(name):
    assert np.all(np.diff(SCHEDULES[name](jnp.linspace(0, 1, 1001))) < 0)


def test_scaled_linear_agrees_with_the_cumulative_product_at_every_index():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = np.cumprod(1 - betas)
    t = jnp.arange(1, 1001) / 1000
    alpha, _ = schedules.alpha_sigma(schedules.scaled_linear()(t))
    np.testing.assert_allclose(alpha**2, alpha_bar, rtol=2e-5)
    np.testing.assert_array_equal(schedules.timestep_index(t), np.arange(1000))


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 16, 512])
def test_grids_of_a_discrete_chain_visit_whole_indices_and_nest(num_steps):
    t = jnp.arange(num_steps + 1) / num_steps
    index = [round(1000 * n / num_steps) - 1 for n in range(1, num_steps + 1)]
    np.testing.assert_array_equal(schedules.timestep_index(t)[1:], index)
    schedule = schedules.linear()
    np.testing.assert_array_equal(schedule(t)[1:], schedule((np.array(index) + 1) / 1000))
    assert schedule(t)[0] == schedules.LOG_SNR_LIMIT
    finer = schedules.timestep_index(jnp.arange(1, 2 * num_steps + 1) / (2 * num_steps))
    assert set(index) <= set(np.asarray(finer).tolist())


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
def test_converters_name_the_same_x_and_eps(source, target):
    x, eps = draw(0), draw(1)
    log_snr = jnp.linspace(-3, 3, 6)
    alpha, sigma = process.levels(log_snr, x)
    z = alpha * x + sigma * eps
    values = {"x": x, "eps": eps, "v": alpha * eps - sigma * x}
    found = process.convert(values[source], source=source, target=target, z=z, log_snr=log_snr)
    np.testing.assert_allclose(found, values[target], atol=2e-5)


def test_two_heads_are_weighed_by_how_well_each_knows_x():
    z, x, eps = draw(0), draw(1), draw(2)
    log_snr = jnp.linspace(-12, 12, 6)
    alpha, sigma = process.levels(log_snr, z)
    found = process.prediction_from(
        jnp.concatenate([x, eps], axis=-1), source="x_and_eps", z=z, log_snr=log_snr
    )
    np.testing.assert_allclose(found.x, sigma**2 * x + alpha * (z - sigma * eps), atol=1e-5)
    np.testing.assert_allclose(process.add_noise(*found, log_snr=log_snr), z, atol=1e-5)


def test_clipping_holds_x_and_keeps_the_pair_consistent():
    z, log_snr = 3.0 * draw(0), jnp.linspace(-3, 3, 6)
    raw = process.prediction_from(draw(1), source="v", z=z, log_snr=log_snr)
    found = process.clip_x(raw, z=z, log_snr=log_snr)
    assert np.abs(raw.x).max() > 1.5
    np.testing.assert_array_equal(found.x, np.clip(raw.x, -1, 1))
    np.testing.assert_allclose(process.add_noise(found.x, found.eps, log_snr=log_snr), z, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("t", "s"), [(0.9, 0.3), (0.2, 0.7)])
def test_ddim_with_the_true_x_lands_on_the_same_noise(name, t, s):
    x, eps = draw(0), draw(1)
    log_snr_t, log_snr_s = (SCHEDULES[name](jnp.full(6, each)) for each in (t, s))
    z = process.add_noise(x, eps, log_snr=log_snr_t)
    prediction = process.prediction_from(x, source="x", z=z, log_snr=log_snr_t)
    landed = process.ddim_step(prediction, log_snr_s)
    np.testing.assert_allclose(landed, process.add_noise(x, eps, log_snr=log_snr_s), atol=3e-5)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("move", ["back", "forth"])
def test_random_moves_keep_the_signal_and_the_variance(name, move):
    log_snr_t, log_snr_s = (SCHEDULES[name](jnp.array([each])) for each in (0.6, 0.5))
    start, end = (log_snr_t, log_snr_s) if move == "back" else (log_snr_s, log_snr_t)
    one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))

    def moved(x, eps, noise, **options):
        z = process.add_noise(x, eps, log_snr=start)
        if move == "forth":
            return process.forward_hop(z, noise, log_snr_s=start, log_snr_t=end)
        prediction = process.Prediction(x, eps)
        return process.posterior_step(
            prediction, noise, z=z, log_snr_t=start, log_snr_s=end, **options
        )

    alpha, sigma = process.levels(end, one)
    np.testing.assert_allclose(moved(one, zero, zero), alpha, rtol=1e-5)
    old, new = moved(zero, one, zero), moved(zero, zero, one)
    np.testing.assert_allclose(jnp.hypot(old, new), sigma, rtol=1e-5)
    assert min(old, new) > 0.1 * sigma
    if move == "back":
        widest = moved(zero, zero, one, variance_interpolation=1.0)
        np.testing.assert_allclose(widest / new, process.levels(start, one)[1] / sigma, rtol=1e-5)


def drawn(indices, shape):
    key = jax.random.key(0)
    return samplers.initial_noise(key, indices, shape), samplers.step_keys(key, indices)


def final_deviation(sampler, num_steps, count=20_000):
    schedule = SCHEDULES["cosine"]
    z, keys = drawn(jnp.arange(count), (1,))
    x = samplers.SAMPLERS[sampler](gaussian_predict(schedule), schedule, z, keys, num_steps)
    return float(x.std())


def exact_jump_predict(schedule, num_steps):
    """Return a student that jumps exactly over two grid steps (one from t = 1/N) on Gaussian data."""

    def deviation_at(t):
        alpha, sigma = schedules.alpha_sigma(schedule(t))
        return jnp.sqrt(alpha**2 * DEVIATION**2 + sigma**2)

    def predict(z, t):
        end = jnp.maximum(t - 2 / num_steps, 0.0)
        z_end = z * (deviation_at(end) / deviation_at(t))[:, None]
        (alpha, sigma), (alpha_end, sigma_end) = (
            process.levels(schedule(each), z) for each in (t, end)
        )
        determinant = sigma * alpha_end - sigma_end * alpha
        return process.Prediction(
            x=(sigma * z_end - sigma_end * z) / determinant,
            eps=(alpha_end * z - alpha * z_end) / determinant,
        )

    return predict


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8])
def test_stochastic_chain_of_exact_jumps_keeps_the_marginal(num_steps):
    schedule = SCHEDULES["cosine"]
    z, keys = drawn(jnp.arange(40_000), (1,))
    x = samplers.stochastic(exact_jump_predict(schedule, num_steps), schedule, z, keys, num_steps)
    np.testing.assert_allclose(x.std(), DEVIATION, rtol=0.015)


@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "dpm_solver_pp"])
def test_samplers_reach_the_data_distribution(sampler):
    np.testing.assert_allclose(final_deviation(sampler, 512), DEVIATION, rtol=0.02)


def ode_error(sampler, num_steps):
    """Return the distance from the exact flow, z -> z * (final deviation / 1), on Gaussian data."""
    schedule = SCHEDULES["shifted"]
    z = jnp.ones((2, 1))
    keys = samplers.step_keys(jax.random.key(0), jnp.arange(2))
    x = samplers.SAMPLERS[sampler](gaussian_predict(schedule), schedule, z, keys, num_steps)
    return abs(float(x[0, 0]) - DEVIATION)


def test_ddim_converges_and_the_multistep_solver_converges_faster():
    assert 1.7 < ode_error("ddim", 64) / ode_error("ddim", 128) < 2.3
    assert ode_error("dpm_solver_pp", 64) < 0.3 * ode_error("ddim", 64)
    np.testing.assert_allclose(ode_error("dpm_solver_pp", 1), ode_error("ddim", 1), rtol=1e-6)


def test_encode_then_decode_returns_better_with_more_steps():
    schedule = SCHEDULES["cosine"]
    predict = gaussian_predict(schedule)
    x = DEVIATION * draw(0)
    keys = samplers.step_keys(jax.random.key(0), jnp.arange(len(x)))

    def error(num_steps):
        z = samplers.encode(predict, schedule, x, num_steps)
        return float(jnp.abs(samplers.ddim(predict, schedule, z, keys, num_steps) - x).max())

    assert error(64) < 0.5 * error(16) < 0.5 * error(4)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_encoding_gaussian_data_scales_it_as_the_closed_form_says(num_steps):
    schedule = SCHEDULES["cosine"]
    t = jnp.linspace(0.0, 1.0, num_steps + 1)
    alpha, sigma = (np.asarray(each, np.float64) for each in schedules.alpha_sigma(schedule(t)))
    variance = alpha**2 * DEVIATION**2 + sigma**2
    covariance = alpha[1:] * alpha[:-1] * DEVIATION**2 + sigma[1:] * sigma[:-1]
    z = samplers.encode(gaussian_predict(schedule), schedule, draw(0), num_steps)
    np.testing.assert_allclose(z, draw(0) * np.prod(covariance / variance[:-1]), rtol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_a_sample_depends_on_its_own_key_alone(sampler, num_steps):
    schedule = SCHEDULES["cosine"]

    def run(indices):
        z, keys = drawn(indices, (2,))
        return samplers.SAMPLERS[sampler](gaussian_predict(schedule), schedule, z, keys, num_steps)

    together, alone = run(jnp.arange(5)), run(jnp.array([3]))
    assert np.isfinite(together).all()
    np.testing.assert_allclose(together[3], alone[0], rtol=1e-6)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_the_last_step_returns_the_predicted_x(sampler):
    schedule = SCHEDULES["cosine"]
    z = 100.0 * draw(0)

    def predict(z, t):
        return process.prediction_from(jnp.tanh(z), source="x", z=z, log_snr=schedule(t))

    keys = samplers.step_keys(jax.random.key(0), jnp.arange(len(z)))
    found = samplers.SAMPLERS[sampler](predict, schedule, z, keys, 1)
    np.testing.assert_allclose(found, jnp.tanh(z), atol=1e-6)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_sampling_from_half_way_makes_the_remaining_steps(sampler):
    """The data have no spread, so that fresh noise and the solver's fresh memory don't matter."""
    schedule = SCHEDULES["cosine"]
    target = draw(1)

    def predict(z, t):
        return process.prediction_from(target, source="x", z=z, log_snr=schedule(t))

    calls = []

    def counted(z, t):
        jax.debug.callback(lambda time: calls.append(float(time[0])), t)
        return predict(z, t)

    keys = samplers.step_keys(jax.random.key(0), jnp.arange(len(target)))
    run = jax.jit(samplers.SAMPLERS[sampler], static_argnums=(0, 1))
    found = run(counted, schedule, draw(0), keys, 8, 3)
    jax.effects_barrier()
    np.testing.assert_allclose(found, target, atol=1e-5)
    np.testing.assert_allclose(sorted(calls), np.arange(1, 4) / 8, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddim", "stochastic"])
def test_known_values_are_kept_and_noised_for_the_network(sampler):
    schedule = SCHEDULES["cosine"]
    known, noise = draw(1), draw(2)
    free = jnp.arange(known.shape[1]) == 0

    def predict(z, t):
        # The painted value copies the noisy neighbour that predict sees.
        return process.prediction_from(jnp.roll(z, 1, axis=1), source="x", z=z, log_snr=schedule(t))

    keeping = samplers.keeping(predict, samplers.Known(known, noise, free[None]))
    keys = samplers.step_keys(jax.random.key(0), jnp.arange(len(known)))
    x = samplers.SAMPLERS[sampler](keeping, schedule, noise, keys, 4)
    np.testing.assert_array_equal(x[:, 1:], known[:, 1:])
    seen = process.add_noise(known, noise, log_snr=schedule(jnp.full(len(known), 0.25)))
    if sampler == "ddim":
        np.testing.assert_allclose(x[:, 0], seen[:, -1], atol=1e-5)
    else:
        assert np.abs(x[:, 0] - seen[:, -1]).max() > 1e-3


def toy_denoiser():
    def predict(z, t, condition, w):
        x = z * 0.1 + condition["label"][:, None].astype(jnp.float32)
        return process.Prediction(x, z - x)

    return Denoiser(predict, guided=False, null={"label": 9})


def test_guidance_ends_and_scale():
    z, t, label = draw(0), jnp.full(6, 0.5), {"label": jnp.arange(6)}
    plain, guided = toy_denoiser(), with_guidance(toy_denoiser())
    conditional = plain.predict(z, t, label, None)
    unconditional = plain.predict(z, t, {"label": jnp.full(6, 9)}, None)
    for w, expected in ((0.0, conditional), (-1.0, unconditional)):
        found = guided.predict(z, t, label, jnp.full(6, w))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    assert guidance_scale(weight_from_guidance_scale(7.5)) == 7.5
    scale = jnp.full(6, guidance_scale(2.0))
    diffusers = unconditional.x + scale[:, None] * (conditional.x - unconditional.x)
    found = combine(conditional.x, unconditional.x, w=jnp.full(6, 2.0))
    np.testing.assert_allclose(found, diffusers, rtol=1e-5)


def test_guidance_is_never_applied_twice():
    with pytest.raises(ValueError, match="already inside"):
        with_guidance(with_guidance(toy_denoiser()))
