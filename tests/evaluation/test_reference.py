"""Statistics of the training data: computed once, and never taken for those of other data."""

import dataclasses
import hashlib
import os

import numpy as np
import pytest
from etils import epath

from guided_distill.data import source as data_source
from guided_distill.data.source import from_arrays
from guided_distill.errors import UserError
from guided_distill.evaluation import reference
from guided_distill.evaluation.extractors.extractor import Extractor
from guided_distill.evaluation.metrics.frechet import FeatureStatistics
from guided_distill.evaluation.reference import read_reference, training_reference

PIXELS = np.random.default_rng(0).integers(0, 256, (70, 4, 4, 1), np.uint8)
LABELS = np.arange(70) % 3


def source_of(pixels=PIXELS, labels=LABELS):
    return from_arrays("test", split="train", images=pixels, labels=labels, class_names="abc")


def extractor_of(name="first-pixels", width=3, gain=2.0, apply=None):
    def first_pixels(params, x):
        features = params * x.reshape(len(x), -1)[:, :width]
        return features, features

    return Extractor(name, width, False, apply or first_pixels, np.float32(gain), batch_size=16)


def never(params, x):
    raise AssertionError("the images were read again")


def expected(pixels=PIXELS, gain=2.0):
    return gain * (pixels.reshape(len(pixels), -1)[:, :3] / 127.5 - 1)


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path) / "reference"


@pytest.fixture
def file(folder):
    training_reference(source_of(), extractor_of(), folder)
    return folder / "first-pixels.npz"


def change(file, **fields):
    with np.load(file) as arrays:
        changed = {**arrays, **fields}
    np.savez(file, **changed)


def assert_of(found, features):
    statistics = FeatureStatistics.from_features(features)
    assert found.statistics.count == len(features)
    np.testing.assert_allclose(found.statistics.mean, statistics.mean, atol=1e-6)
    np.testing.assert_allclose(found.statistics.covariance, statistics.covariance, atol=1e-6)
    np.testing.assert_allclose(found.features, features, atol=1e-6)


def test_it_is_of_all_images_and_computed_once(folder):
    assert_of(training_reference(source_of(), extractor_of(), folder), expected())
    again = training_reference(source_of(), extractor_of(apply=never), folder)
    assert_of(again, expected())
    assert again.of == ""


def test_features_are_a_drawn_subset(folder, monkeypatch):
    monkeypatch.setattr(reference, "MAX_SAMPLES", 20)
    monkeypatch.setattr(data_source, "_CHUNK", 16)
    found = training_reference(source_of(), extractor_of(), folder)
    rows = [np.abs(expected() - each).max(axis=1).argmin() for each in found.features]
    assert len(set(rows)) == 20
    assert rows == sorted(rows)
    assert max(rows) > 40
    assert found.statistics.count == 70


def test_the_datas_fingerprint_is_a_hash_of_all_images_as_one_array(monkeypatch):
    monkeypatch.setattr(data_source, "_BYTES", 16 * 4 * 7)
    digest = hashlib.sha256()
    for array in (np.array([70, 4, 4, 1]), np.float32(PIXELS) / np.float32(127.5) - 1, LABELS):
        array = array.astype(np.int32) if array is LABELS else array
        digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    assert reference.data_fingerprint(source_of()) == digest.hexdigest()


@pytest.mark.parametrize(
    "change_of",
    [
        {"pixels": 255 - PIXELS},
        {"pixels": PIXELS[:-1], "labels": LABELS[:-1]},
        {"labels": LABELS[::-1]},
    ],
    ids=["pixels", "size", "labels"],
)
def test_other_data_are_read_again(file, folder, change_of):
    source = source_of(**change_of)
    with pytest.raises(AssertionError, match="read again"):
        training_reference(source, extractor_of(apply=never), folder)
    found = training_reference(source, extractor_of(), folder)
    assert_of(found, expected(change_of.get("pixels", PIXELS)))


def test_the_size_counts_even_where_all_images_are_alike(monkeypatch):
    monkeypatch.setattr(reference, "FINGERPRINT_EXAMPLES", 10)
    flat = np.zeros_like(PIXELS)
    one, other = (
        reference.data_fingerprint(source_of(flat[:count], np.zeros(count, int)))
        for count in (70, 69)
    )
    assert one != other


def test_other_weights_and_damage_are_noticed(file, folder):
    assert_of(training_reference(source_of(), extractor_of(gain=3), folder), expected(gain=3))
    change(file, mean=np.zeros(3))
    assert_of(training_reference(source_of(), extractor_of(gain=3), folder), expected(gain=3))
    file.write_bytes(file.read_bytes()[:200])
    assert_of(training_reference(source_of(), extractor_of(gain=3), folder), expected(gain=3))


def test_a_file_that_is_named(file):
    own = read_reference(file, source_of(), extractor_of())
    assert_of(own, expected())
    assert own.of == ""
    assert read_reference(file, source_of(255 - PIXELS), extractor_of()).of == "first-pixels"


def test_a_pipe_in_place_of_statistics_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(UserError, match="holds no statistics"):
        read_reference(epath.Path(tmp_path) / "pipe.npz", source_of(), extractor_of())


def test_statistics_of_the_fid_literature(tmp_path):
    file = epath.Path(tmp_path) / "cifar.npz"
    mean, covariance = np.arange(3), np.diag([1, 2, 3])
    np.savez(file, mu=mean, sigma=covariance)
    found = read_reference(file, source_of(), extractor_of())
    np.testing.assert_array_equal(found.statistics.mean, mean)
    np.testing.assert_array_equal(found.statistics.covariance, covariance)
    assert (found.features, found.of) == (None, "cifar")
    with pytest.raises(UserError, match=r"cifar\.npz has a mean \[3\] .* width 5"):
        read_reference(file, source_of(), extractor_of(width=5))


@pytest.mark.parametrize(
    ("mean", "covariance", "said"),
    [
        (np.float64(3), np.eye(3), "a mean .. and a covariance .3, 3."),
        (np.zeros(3, complex), np.eye(3), "not finite numbers"),
        (np.zeros(3, "M8[s]"), np.eye(3), "not finite numbers"),
        (np.array(["", "", ""]), np.eye(3), "not finite numbers"),
        (np.zeros(3), np.diag([1, np.nan, 1]), "not finite numbers"),
    ],
)
def test_statistics_that_are_no_numbers_are_refused(tmp_path, mean, covariance, said):
    file = epath.Path(tmp_path) / "odd.npz"
    np.savez(file, mu=mean, sigma=covariance)
    with pytest.raises(UserError, match=said):
        read_reference(file, source_of(), extractor_of())


@pytest.mark.parametrize(
    ("extractor", "said"),
    [
        ({"width": 5}, "a mean .3. and .* first-pixels have width 5"),
        ({"name": "other"}, "the extractor first-pixels, and this run needs other"),
        ({"gain": 5}, "other weights of first-pixels"),
    ],
)
def test_statistics_of_another_extractor_are_refused(file, extractor, said):
    with pytest.raises(UserError, match=said):
        read_reference(file, source_of(), extractor_of(**extractor))


def test_statistics_of_another_size_or_damaged_are_refused(file, tmp_path):
    with pytest.raises(UserError, match="shape 4 x 4 x 1, and this run needs 5 x 4 x 1"):
        read_reference(file, source_of(np.zeros((70, 5, 4, 1), np.uint8)), extractor_of())
    change(file, features=np.zeros((70, 3), np.float32))
    with pytest.raises(UserError, match="is damaged"):
        read_reference(file, source_of(), extractor_of())
    (tmp_path / "text.npz").write_text("no statistics")
    with pytest.raises(UserError, match="holds no statistics"):
        read_reference(epath.Path(tmp_path / "text.npz"), source_of(), extractor_of())


def test_extractors_are_distinguished_by_every_weight():
    one = extractor_of()
    params = {"a": np.zeros(3), "b": np.ones(2)}
    hashes = {
        reference._about(source_of(), dataclasses.replace(one, params=each))["weights"]
        for each in (
            params,
            {**params, "b": np.array([1, 1.001])},
            {**params, "a": np.zeros((3, 1))},
        )
    }
    assert len(hashes) == 3
