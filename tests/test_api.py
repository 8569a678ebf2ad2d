"""The Python API on small runs: it returns the same images as the sampler, and helpful errors."""

import numpy as np
import pytest

import guided_distill
from guided_distill import cli
from guided_distill.runs.trained import load_finished
from guided_distill.sampling.labels import of_labels
from guided_distill.sampling.request import Request
from guided_distill.sampling.sample import sample


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny_arguments):
    path = tmp_path_factory.mktemp("run")
    more = ["--config.halving.samplers=('ddim','encode')", "--config.halving.last_num_steps=2"]
    assert cli.main(["train", "--workdir", str(path), *tiny_arguments, *more]) == 0
    return path


@pytest.fixture(scope="module")
def student(workdir):
    return guided_distill.load(workdir)


def test_a_run_is_its_last_student_that_samples(workdir, student):
    assert student.about.sampler == "ddim"
    assert student.about.num_steps == 2
    expected = sample(
        load_finished(workdir / "halving_ddim_2"),
        Request(condition=of_labels([3, 7, 3]), w=1.5, seed=4),
    )
    found = student.sample(labels=["3", 7, 3], w=1.5, seed=4, batch_size=2)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_noise_of_an_encoder_can_be_decoded(workdir, student):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32)
    encoder = guided_distill.load(workdir / "halving_encode_2")
    noise = encoder.encode(images, labels=[1, 2])
    assert noise.shape == images.shape
    assert student.sample(labels=[1, 2], noise=noise).shape == images.shape
    with pytest.raises(guided_distill.UserError, match=r"\[2, 8, 8, 1\] and 3 labels"):
        encoder.encode(images, labels=[1, 2, 3])
    with pytest.raises(guided_distill.UserError, match="trained to encode"):
        encoder.sample(labels=[1])


def test_requests_that_cannot_be_met_give_a_reason(student, tmp_path):
    image = np.zeros((1, 8, 8, 1), np.float32)
    for request, message in (
        (lambda: student.sample(), "no labels: give names or numbers of classes, such as 0, 1"),
        (lambda: student.sample(labels=["ten"]), "labels is 'ten'"),
        (lambda: student.sample(labels=[-1]), "labels is -1"),
        (lambda: student.sample(prompts=["a"]), "give labels"),
        (lambda: student.sample(labels=[1], num_steps=3), "trained for 2 steps"),
        (lambda: student.edit(image, ["a"], strength=0.5), "conditioned on text"),
        (lambda: student.inpaint(image, image[..., 0] > 0, ["a"]), "conditioned on text"),
        (lambda: guided_distill.load(tmp_path), "holds no run"),
    ):
        with pytest.raises(guided_distill.UserError, match=message):
            request()
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        guided_distill.lod  # noqa: B018
