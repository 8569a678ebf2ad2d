"""Samples from weights: what they may depend on, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from guided_distill.api import Model
from guided_distill.config import parse
from guided_distill.diffusion import samplers
from guided_distill.diffusion.guidance import with_guidance
from guided_distill.errors import UserError
from guided_distill.runs.trained import Description, Trained
from guided_distill.sampling.labels import class_index, cycling_labels, of_labels
from guided_distill.sampling.programs import Inputs, compiled_noise, compiled_sampler
from guided_distill.sampling.request import Request, usual_w
from guided_distill.sampling.sample import encode, predictions, sample, sample_batches
from guided_distill.verbs.shared import label

OPTIONS = {"width": 16, "depth": 1, "embedding_width": 16}


def trained(
    stage, *, num_steps=None, sampler=None, data_shape=(2,), w_range=(0.0, 4.0), schedule="cosine"
):
    """A checkpoint's content with random weights, none of them zero."""
    description = Description(
        stage=stage,
        total_steps=1,
        num_steps=num_steps,
        sampler=sampler,
        w_min=None if stage == "teacher" else w_range[0],
        w_max=None if stage == "teacher" else w_range[1],
        data_shape=data_shape,
        class_names=("0", "1", "2"),
        teacher=None,
        package_version="0",
        experiment=parse({"model": {"name": "mlp", "options": OPTIONS, "schedule": schedule}}),
    )
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(description.network().init, jax.random.key(0))
    params = jax.tree.map(
        lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), shapes
    )
    return Trained(path="", step=1, params=params, description=description)


TEACHER = trained("teacher")
STUDENT = trained("halving", num_steps=2, sampler="stochastic")
DECODER = trained("halving", num_steps=2, sampler="ddim")
ENCODER = trained("halving", num_steps=2, sampler="encode")


def test_numbers_are_places_of_classes_and_strings_are_names(caplog):
    names = tuple(sorted(str(number) for number in range(12)))
    assert names[2] == "10"
    about = dataclasses.replace(STUDENT.description, class_names=names)
    for label_, place in ((0, 0), ("0", 0), (2, 2), (np.int64(2), 2), ("2", 4), ("10", 2)):
        assert class_index(label_, about, flag="labels") == place
    (line,) = caplog.messages
    assert "class 2 is the one named '10', and the one named '2' is class 4" in line
    for label_ in (12, -1, 1.0, None, "12", "", 10**30):
        with pytest.raises(UserError, match=r"labels is .*; give a number in 0 \.\.\. 11"):
            class_index(label_, about, flag="labels")


@pytest.mark.parametrize(
    ("text", "expected"), [("2", 2), ("-1", "-1"), ("\u0662", "\u0662"), ("9" * 30, "9" * 30)]
)
def test_the_command_line_takes_digits_for_a_number(text, expected):
    assert label(text) == expected


def test_a_sample_depends_neither_on_the_batch_nor_on_its_size():
    labels = cycling_labels(19, 3)
    whole, parts = (
        sample(STUDENT, Request(condition=of_labels(labels), w=1.0, batch_size=size))
        for size in (32, 8)
    )
    assert whole.shape == (19, 2)
    np.testing.assert_allclose(parts, whole, atol=1e-4)
    assert len(np.unique(whole.round(3), axis=0)) == 19


def test_no_more_examples_run_than_are_asked_for(monkeypatch):
    ran = []

    def counted(*how, **options):
        run = compiled_sampler(*how, **options)

        def call(params, inputs):
            ran.append(inputs.z)
            return run(params, inputs)

        return call

    monkeypatch.setattr("guided_distill.sampling.sample.compiled_sampler", counted)
    for labels, size, expected in (([1, 2], 256, [2]), ([0, 1, 2, 0, 1], 4, [4, 4])):
        sample(STUDENT, Request(condition=of_labels(labels), w=1.0, batch_size=size))
        assert [len(z) for z in ran] == expected
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), 1), (2,))
        np.testing.assert_array_equal(ran[0][1], noise)
        ran.clear()


@pytest.mark.parametrize(
    ("w_range", "usual"), [((2.0, 14.0), 2.0), ((3.0, 3.0), 3.0), ((0, 4), 1.0)]
)
def test_the_usual_weight_is_one_that_was_trained(w_range, usual):
    student = trained("halving", num_steps=2, sampler="ddim", w_range=w_range)
    labels = cycling_labels(4, 3)
    expected = sample(student, Request(condition=of_labels(labels), w=usual))
    model = Model(student)
    assert model.usual_w == usual
    np.testing.assert_array_equal(model.sample(labels=labels), expected)
    encoder = trained("halving", num_steps=2, sampler="encode", w_range=w_range)
    noise = encode(encoder, expected, Request(condition=of_labels(labels), w=w_range[0]))
    np.testing.assert_array_equal(Model(encoder).encode(expected, labels=labels), noise)


def test_a_teacher_takes_any_finite_weight():
    assert usual_w(TEACHER.description) == 1.0
    assert np.isfinite(
        sample(TEACHER, Request(condition=of_labels([0]), w=-7.5, num_steps=1))
    ).all()
    for w in (float("nan"), float("inf")):
        for options in ({}, {"allow_untrained": True}):
            with pytest.raises(UserError, match=f"--w is {w}; make it at least -1000"):
                sample(TEACHER, Request(condition=of_labels([0]), w=w, num_steps=1, **options))
        with pytest.raises(UserError, match="--w_encode is"):
            encode_one(TEACHER, w=w)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_a_chain_has_no_more_steps_than_noise_levels(sampler):
    chain = trained("teacher", schedule="linear")
    request = {"condition": of_labels([0]), "w": 1.0, "sampler": sampler, "allow_untrained": True}
    assert np.isfinite(sample(chain, Request(num_steps=1000, **request))).all()
    with pytest.raises(UserError, match=r"--num_steps is 1001, but .* linear, is a chain of 1000"):
        sample(chain, Request(num_steps=1001, **request))


def test_one_call_serves_many_weights():
    condition, weights = of_labels(cycling_labels(4, 3)), np.array([0.0, 1.0, 2.5, 4.0])
    together = sample(STUDENT, Request(condition, weights))
    for index, w in enumerate(weights):
        alone = sample(STUDENT, Request(condition, float(w)))
        np.testing.assert_array_equal(together[index], alone[index])
    with pytest.raises(UserError, match=r"--w is 4.5, outside the range \[0.0, 4.0\]"):
        sample(STUDENT, Request(condition, weights + 0.5))


def test_samples_from_an_index_on_are_those_of_the_whole():
    labels = cycling_labels(19, 3)
    whole = sample(STUDENT, Request(condition=of_labels(labels), w=1.0, batch_size=8))
    for start in (0, 5, 16):
        batches = list(
            sample_batches(STUDENT, Request(of_labels(labels), 1.0, batch_size=8, start=start))
        )
        np.testing.assert_allclose(np.concatenate(batches), whole[start:], atol=1e-4)
    assert not list(
        sample_batches(STUDENT, Request(condition=of_labels(labels), w=1.0, batch_size=8, start=19))
    )


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_predictions_are_those_on_the_way_to_the_samples(sampler):
    request = {
        "condition": of_labels(cycling_labels(3, 3)),
        "w": 1.0,
        "sampler": sampler,
        "seed": 5,
        "allow_untrained": True,
    }
    x = predictions(TEACHER, Request(num_steps=4, **request))
    assert x.shape == (4, 3, 2)
    # A sampler of one step answers what is predicted at t = 1.
    for step, num_steps in ((0, 1), (3, 4)):
        found = sample(TEACHER, Request(num_steps=num_steps, **request))
        np.testing.assert_allclose(x[step], found, atol=1e-4)
    assert np.abs(np.diff(x, axis=0)).max(axis=(1, 2)).min() > 1e-3
    assert predictions(TEACHER, Request(num_steps=2, **request)).shape == (2, 3, 2)
    with pytest.raises(ValueError, match="leave `first` out"):
        predictions(TEACHER, Request(num_steps=2, first=1, noise=x[0], **request))


@pytest.mark.parametrize("who", [TEACHER, STUDENT, ENCODER], ids=["teacher", "student", "encoder"])
def test_devices_make_no_difference(who, mesh_of):
    about = who.description
    sampler = about.sampler or "ddim"

    def run(count):
        noise, keys = compiled_noise((2,), mesh_of(count))(jax.random.key(0), np.arange(8))
        return np.asarray(
            compiled_sampler(about.network(), sampler, mesh_of(count), clipped=False)(
                who.params,
                Inputs(
                    noise,
                    keys,
                    of_labels(cycling_labels(8, 3)),
                    null=about.network().null,
                    known=None,
                    w=np.linspace(0, 4, 8, dtype=np.float32),
                    num_steps=np.int32(2),
                    first=np.int32(2),
                ),
            )
        )

    one, *others = map(run, (1, 2, 4, 8))
    for other in others:
        np.testing.assert_allclose(other, one, atol=1e-4)


def test_noise_that_is_given_is_decoded_as_noise_that_is_drawn(mesh_of):
    labels = cycling_labels(10, 3)
    drawn = sample(STUDENT, Request(condition=of_labels(labels), w=1.0, seed=3))
    noise, _ = compiled_noise((2,), mesh_of(1))(jax.random.key(3), np.arange(10))
    noise = np.asarray(noise)
    for size in (16, 4):
        given = sample(
            STUDENT,
            Request(condition=of_labels(labels), w=1.0, seed=3, noise=noise, batch_size=size),
        )
        np.testing.assert_allclose(given, drawn, atol=1e-5)
    other = sample(STUDENT, Request(condition=of_labels(labels), w=1.0, seed=3, noise=noise + 0.1))
    assert np.abs(other - drawn).max() > 1e-3


@pytest.mark.parametrize("who", [TEACHER, ENCODER], ids=["teacher", "encoder"])
def test_encoding_is_the_plain_encoder_of_its_network_at_its_own_steps(who):
    about, w, steps = who.description, 1.5, 2
    x = np.random.default_rng(1).uniform(-1, 1, (11, 2)).astype(np.float32)
    labels = cycling_labels(11, 3)
    denoiser = about.network().denoiser(who.params)
    if not denoiser.guided:
        denoiser = with_guidance(denoiser)
    expected = samplers.encode(
        lambda z, t: denoiser.predict(z, t, of_labels(labels), np.full(11, w, np.float32)),
        about.network().schedule,
        x,
        steps,
    )
    asked = {} if who is ENCODER else {"num_steps": steps}
    for size in (16, 4):
        found = encode(who, x, Request(condition=of_labels(labels), w=w, batch_size=size, **asked))
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_encoding_an_image_never_clips_it():
    """Clipping sets eps to (z - x) / sigma_0 at the ends of the range: nothing, at t = 0."""
    who = trained("halving", num_steps=1, sampler="encode", data_shape=(2, 2, 1))
    x = np.ones((4, 2, 2, 1), np.float32)
    labels = cycling_labels(4, 3)
    denoiser = who.description.network().denoiser(who.params)
    eps = denoiser.predict(
        x, np.zeros(4, np.float32), of_labels(labels), np.ones(4, np.float32)
    ).eps
    found = encode(who, x, Request(condition=of_labels(labels), w=1.0))
    np.testing.assert_allclose(found, eps, atol=1e-3)
    assert np.abs(eps).min() > 0.01


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: sample(ENCODER, Request(condition=of_labels([0]), w=1.0)), "trained to encode"),
        (
            lambda: sample(TEACHER, Request(of_labels([0]), 1.0, sampler="encode")),
            "--sampler",
        ),
        (lambda: encode_one(DECODER), "not to encode"),
        (lambda: encode_one(ENCODER, num_steps=3), "in 2 steps, not in 3"),
        (lambda: encode_one(TEACHER, num_steps=0), "--num_steps is 0; make it at least 1"),
        (lambda: encode_one(ENCODER, w=4.5), "--w_encode is 4.5, outside"),
        (lambda: encode_one(ENCODER, condition=of_labels([3])), "classes in 0 ... 2"),
    ],
)
def test_what_cannot_be_encoded_or_sampled_is_refused(call, said):
    with pytest.raises(UserError, match=said):
        call()


def encode_one(who, **request_):
    x = np.zeros((1, 2), np.float32)
    return encode(who, x, Request(**{"condition": of_labels([0]), "w": 1.0, **request_}))


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"num_steps": 4}, "trained for 2 steps"),
        ({"num_steps": 1}, "trained for 2 steps"),
        ({"sampler": "ddim"}, "trained for 2 steps"),
        ({"num_steps": 0, "allow_untrained": True}, "--num_steps is 0; make it at least 1"),
        ({"w": 4.5}, "outside the range"),
        ({"w": -0.5}, "outside the range"),
        ({"condition": of_labels([3])}, "--labels"),
    ],
)
def test_what_was_not_trained_is_refused(request_, said):
    with pytest.raises(UserError, match=said):
        sample(STUDENT, Request(**{"condition": of_labels([0]), "w": 1.0, **request_}))
