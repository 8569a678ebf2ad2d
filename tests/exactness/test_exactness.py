"""Stages one and two, compared with an exact teacher: the closed form of the 2-D mixture."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from energy import energy_distance

from guided_distill.data.mixture import DEFAULT_MIXTURE as MIXTURE
from guided_distill.diffusion.guidance import Denoiser
from guided_distill.diffusion.process import add_noise, prediction_from
from guided_distill.diffusion.schedules import alpha_sigma, cosine
from guided_distill.models.outline import Outline
from guided_distill.models.registry import Network, build_network
from guided_distill.objectives.guidance import Guidance, GuidanceStage
from guided_distill.objectives.halving import Halving, HalvingStage
from guided_distill.sampling.labels import cycling_labels, of_labels
from guided_distill.sampling.programs import Inputs, compiled_noise, compiled_sampler
from guided_distill.stages import compiled_step
from guided_distill.training.state import initial_state

WEIGHTS = (0.0, 1.0, 2.0, 4.0)
PER_CLASS = 500
OPTIONS = {"width": 128, "depth": 3, "embedding_width": 64}
GUIDANCE = Guidance(
    steps=3600,
    batch_size=512,
    learning_rate=5e-3,
    learning_rate_schedule="cosine",
    weighting="snr_plus_one",
)
HALVING = Halving(steps=250, batch_size=512, learning_rate=1e-3, learning_rate_schedule="linear")
ROUNDS = (16, 8, 4)
DISPATCH = 100


class ExactNetwork(Network):
    """A network that, without w, returns the closed form for any weights."""

    def denoiser(self, params, **settings):
        if self.w_conditioned:
            return super().denoiser(params, **settings)

        def predict(z, t, condition, w):
            log_snr = self.schedule(t)
            x = MIXTURE.denoise(z, *alpha_sigma(log_snr), condition["label"])
            return prediction_from(x, source="x", z=z, log_snr=log_snr)

        return Denoiser(predict, guided=False, null=self.null)


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw(key, count, batch_size):
    label_key, point_key = jax.random.split(key)
    label = jax.random.randint(label_key, (count * batch_size,), 0, MIXTURE.num_classes)
    batch = {"image": MIXTURE.sample(point_key, label), "label": label}
    return jax.tree.map(lambda a: a.reshape(count, batch_size, *a.shape[1:]), batch)


def train(stage, *, start, frozen, network, mesh):
    settings = stage.settings
    step, optimizer = compiled_step(
        stage,
        student=network.conditioned_on_w(),
        teacher=network.conditioned_on_w() if stage.kind == "halving" else network,
        mesh=mesh,
    )
    state, key = initial_state(start, optimizer, ema_decay=0.0), jax.random.key(1)
    first = draw(jax.random.key(0), DISPATCH, settings.batch_size)
    # Here a few programs run for long, so optimizing them pays.
    program = step.lower(state, frozen, first, key).compile({"xla_backend_optimization_level": 2})
    for index in range(settings.steps // DISPATCH):
        batches = draw(jax.random.key(index), DISPATCH, settings.batch_size)
        state, _ = program(state, frozen, batches, key)
    return state.params


@pytest.fixture(scope="module")
def teacher():
    network = build_network(
        name="mlp",
        options=OPTIONS,
        parameterization="v",
        schedule=cosine(),
        dtype="float32",
        outline=Outline((2,), MIXTURE.num_classes),
    )
    fields = {field.name: getattr(network, field.name) for field in dataclasses.fields(network)}
    return ExactNetwork(**fields)


@pytest.fixture(scope="module")
def guided_student(teacher, mesh_of):
    start = teacher.conditioned_on_w().init(jax.random.key(0))
    return train(
        GuidanceStage(GUIDANCE, GUIDANCE.steps, GUIDANCE.w_range),
        start=start,
        frozen={"params": {}, "null": None},
        network=teacher,
        mesh=mesh_of(1),
    )


@pytest.fixture(scope="module")
def four_step_student(teacher, guided_student, mesh_of):
    params = guided_student
    for num_steps in ROUNDS:
        frozen = {"params": params, "num_steps": jnp.asarray(num_steps, jnp.int32), "null": None}
        params = train(
            HalvingStage(HALVING, HALVING.steps, GUIDANCE.w_range, sampler="ddim"),
            start=params,
            frozen=frozen,
            network=teacher,
            mesh=mesh_of(1),
        )
    return params


def test_guided_student_predicts_the_exact_guided_x(teacher, guided_student):
    count = 20_000
    keys = jax.random.split(jax.random.key(2), 3)
    batch = jax.tree.map(lambda a: a[0], draw(keys[0], 1, count))
    label, w = batch["label"], np.linspace(0.0, 4.0, count, dtype=np.float32)
    t = jax.random.uniform(keys[1], (count,))
    log_snr = teacher.schedule(t)
    z = add_noise(batch["image"], jax.random.normal(keys[2], (count, 2)), log_snr=log_snr)
    found = jax.jit(
        lambda params: (
            teacher.conditioned_on_w().denoiser(params).predict(z, t, {"label": label}, w).x
        )
    )(guided_student)
    conditional, unconditional = (
        MIXTURE.denoise(z, *alpha_sigma(log_snr), each)
        for each in (label, jnp.full_like(label, MIXTURE.num_classes))
    )
    exact = conditional + w[:, None] * (conditional - unconditional)

    squared_error, squared = (
        np.sum(np.square(each), axis=-1) for each in (np.asarray(found - exact), np.asarray(exact))
    )

    def relative_error(chosen):
        return np.sqrt(squared_error[chosen].mean() / squared[chosen].mean())

    assert relative_error(w >= 0) < 0.01
    for low in (1, 2, 3):
        assert relative_error((low <= w) & (w <= low + 1)) < 0.01


def test_four_steps_are_as_good_as_1024_of_the_exact_teacher(teacher, four_step_student, mesh_of):
    count = PER_CLASS * MIXTURE.num_classes
    label = cycling_labels(count, MIXTURE.num_classes)
    data = np.asarray(MIXTURE.sample(jax.random.key(3), label))
    weights = np.asarray(WEIGHTS, np.float32)

    def distances(network, params, num_steps):
        """Return the mean over classes for each w, all with the same noise and data."""
        noise = compiled_noise((2,), mesh_of(1))(
            jax.random.key(4), np.tile(np.arange(count), len(weights))
        )
        samples = compiled_sampler(network, "ddim", mesh_of(1), clipped=False)(
            params,
            Inputs(
                *noise,
                of_labels(np.tile(label, len(weights))),
                null=network.null,
                known=None,
                w=np.repeat(weights, count),
                num_steps=np.int32(num_steps),
                first=np.int32(num_steps),
            ),
        )
        return [
            np.mean([energy_distance(each[label == k], data[label == k]) for k in set(label)])
            for each in np.split(np.asarray(samples), len(weights))
        ]

    exact = distances(teacher, {}, 1024)
    found = distances(teacher.conditioned_on_w(), four_step_student, 4)
    np.testing.assert_allclose(found[1:], exact[1:], rtol=0.1)
    assert np.mean(found) < 1.1 * np.mean(exact)
    # Without guidance, the teacher samples the data's distribution: its distance is noise around zero.
    assert found[0] < 0.05 * exact[1]
