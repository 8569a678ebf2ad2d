"""Seeds and draws, against JAX's own keys, and with JAX's default precision turned up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from guided_distill import draws
from guided_distill.data.mixture import DEFAULT_MIXTURE
from guided_distill.diffusion import samplers, schedules
from guided_distill.diffusion.guidance import Denoiser
from guided_distill.diffusion.process import prediction_from
from guided_distill.errors import UserError
from guided_distill.objectives.guidance import Guidance, guidance_loss
from guided_distill.objectives.halving import Halving, Round, halving_loss
from guided_distill.objectives.stage import Examples
from guided_distill.objectives.teacher import Teacher, teacher_loss

WIDE = [7 + 2**32, 2**63, 2**64 - 1]


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_short_seeds_make_the_keys_that_they_always_made(seed):
    np.testing.assert_array_equal(
        jax.random.key_data(draws.key_of(seed)), jax.random.key_data(jax.random.key(seed))
    )


def test_all_bits_of_a_seed_count():
    keys = [tuple(jax.random.key_data(draws.key_of(seed)).tolist()) for seed in (7, *WIDE)]
    assert keys == [(0, 7), (1, 7), (2**31, 0), (2**32 - 1, 2**32 - 1)]
    with jax.enable_x64(True):
        theirs = jax.random.key_data(jax.random.key(7 + 2**32))
    np.testing.assert_array_equal(theirs, keys[1])


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_of_other_sizes_are_refused(seed):
    with pytest.raises(UserError, match=rf"the seed is {seed}; make it at least 0"):
        draws.key_of(seed)


def denoiser(*, guided):
    def predict(z, t, condition, w):
        shift = 0.0 if w is None else w[:, None]
        return prediction_from(
            jnp.tanh(z + t[:, None] + shift),
            source="v",
            z=z,
            log_snr=schedules.cosine()(t),
        )

    return Denoiser(predict, guided=guided, null=None if guided else {"label": 3})


def loss_of(stage):
    x = jnp.linspace(-1.0, 1.0, 24, dtype=jnp.float32).reshape(8, 3)
    condition = {"label": jnp.zeros(8, jnp.int32)}
    examples = Examples(x, condition, jax.random.split(draws.key_of(3), 8))
    schedule = schedules.cosine()
    plain, guided = denoiser(guided=False), denoiser(guided=True)
    if stage == "teacher":
        loss = teacher_loss(plain, examples, schedule=schedule, settings=Teacher(label_dropout=0.3))
    elif stage == "guidance":
        loss = guidance_loss(guided, plain, examples, schedule=schedule, settings=Guidance())
    else:
        loss = halving_loss(
            guided,
            denoiser(guided=True),
            examples,
            schedule=schedule,
            settings=Halving(),
            w_range=(0.0, 4.0),
            aim=Round(jnp.int32(6), "stochastic"),
        )
    return loss.per_example


def samples_of(sampler):
    key, indices = draws.key_of(3), jnp.arange(8)
    z = samplers.initial_noise(key, indices, (3,))
    keys = samplers.step_keys(key, indices)

    def predict(z, t):
        return denoiser(guided=True).predict(z, t, {}, jnp.ones(8, jnp.float32))

    return samplers.SAMPLERS[sampler](predict, schedules.cosine(), z, keys, jnp.int32(4))


DRAWN = {
    **{stage: lambda stage=stage: loss_of(stage) for stage in ("teacher", "guidance", "halving")},
    **{name: lambda name=name: samples_of(name) for name in samplers.SAMPLERS},
    "mixture2d": lambda: DEFAULT_MIXTURE.sample(draws.key_of(3), jnp.zeros(8, jnp.int32)),
}


@pytest.mark.parametrize("what", DRAWN)
def test_nothing_changes_where_jax_computes_in_float64_by_default(what):
    expected = DRAWN[what]()
    with jax.enable_x64(True):
        found = DRAWN[what]()
    assert found.dtype == expected.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_no_noise_of_a_step_is_made_of_the_initial_noise():
    """The words of a key's draws are keys that fold_in makes of it: they must not be the steps'."""
    key, indices = draws.key_of(0), jnp.arange(3)
    of_steps = jax.random.key_data(
        jax.vmap(lambda each: jax.vmap(lambda i: jax.random.fold_in(each, i))(jnp.arange(64)))(
            samplers.step_keys(key, indices)
        )
    )
    of_noise = jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(key, i), (64,)))(indices)
    assert not np.intersect1d(np.bitwise_xor(of_steps[..., 0], of_steps[..., 1]), of_noise).size
    np.testing.assert_array_equal(
        samplers.initial_noise(key, indices, (2,))[2],
        jax.random.normal(jax.random.fold_in(key, 2), (2,)),
    )
