import dataclasses

import numpy as np
import pytest

from guided_distill.data import builtin, source, sources
from guided_distill.data.mixture import DEFAULT_MIXTURE
from guided_distill.data.pixels import from_uint8, to_uint8
from guided_distill.data.source import from_arrays, split_indices, within_memory
from guided_distill.errors import UserError


def test_uint8_round_trip_is_exact_for_every_value():
    values = np.arange(256, dtype=np.uint8)
    scaled = from_uint8(values)
    assert scaled.dtype == np.float32
    assert (scaled[0], scaled[255]) == (-1, 1)
    np.testing.assert_array_equal(to_uint8(scaled), values)


def test_to_uint8_clips_and_rounds_half_to_even():
    np.testing.assert_array_equal(to_uint8(np.array([-3.0, 3.0])), [0, 255])
    halves = np.array([126.5, 127.5, 128.5]) / 127.5 - 1
    np.testing.assert_array_equal(to_uint8(halves), [126, 128, 128])


@pytest.mark.parametrize("name", ["digits", "photo10", "mixture2d"])
def test_source_contract(name):
    source = sources.load_source(name, split="test")
    example = source[3]
    assert example["image"].shape == source.shape
    assert example["image"].dtype == np.float32
    assert example["label"].dtype == np.int32
    assert source.num_classes == len(source.class_names)
    with pytest.raises(IndexError):
        source[len(source)]
    with pytest.raises(dataclasses.FrozenInstanceError):
        source.name = "other"

    images, labels = source.arrays().values()
    assert len(images) == len(labels) == len(source)
    np.testing.assert_array_equal(images[3], example["image"])
    assert labels[3] == example["label"]
    assert np.isfinite(images).all()
    assert np.abs(images).max() <= 1
    assert set(labels) == set(range(source.num_classes))

    some, some_labels = source.arrays(limit=40).values()
    assert some.shape == (40, *source.shape)
    np.testing.assert_array_equal(some, source.arrays(limit=40)["image"])
    assert len(set(some_labels)) > source.num_classes // 2
    assert len(source.arrays(limit=10**9)["image"]) == len(source)


@pytest.mark.parametrize("name", ["digits", "photo10", "mixture2d"])
def test_repr_is_short_and_stable(name):
    text = repr(sources.load_source(name))
    assert text == repr(sources.load_source(name))
    assert text != repr(sources.load_source(name, split="test"))
    assert len(text) < 120


def test_every_digit_is_in_one_of_two_balanced_splits():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    splits = {
        split: sources.load_source("digits", split=split).arrays() for split in ("train", "test")
    }
    images = np.concatenate([splits[split]["image"] for split in sources.SPLITS])
    labels = np.concatenate([splits[split]["label"] for split in sources.SPLITS])
    seen = sorted(zip(labels, map(bytes, to_gray(images)), strict=True))
    assert seen == sorted(zip(bunch.target, map(bytes, bunch.images.astype(np.uint8)), strict=True))
    share = np.bincount(splits["test"]["label"]) / np.bincount(bunch.target)
    np.testing.assert_allclose(share, 0.2, atol=0.01)


def test_the_digits_are_those_of_scikit_learn_bit_by_bit():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = builtin._digits()
    expected = (bunch.images[..., None] / 8 - 1).astype(np.float32)
    np.testing.assert_array_equal(images.view(np.uint32), expected.view(np.uint32), strict=True)
    np.testing.assert_array_equal(labels, bunch.target, strict=True)


def to_gray(images):
    return np.rint((images[..., 0] + 1) * 8).astype(np.uint8)


def test_splits_ignore_the_seed_except_for_drawn_points():
    def images(name, seed):
        return sources.load_source(name, seed=seed).arrays(limit=100)["image"]

    np.testing.assert_array_equal(images("digits", 1), images("digits", 2))
    np.testing.assert_array_equal(images("mixture2d", 1), images("mixture2d", 1))
    assert not np.array_equal(images("mixture2d", 1), images("mixture2d", 2))


def test_mixture_points_are_balanced_and_follow_the_mixture():
    train, train_labels = sources.load_source("mixture2d").arrays().values()
    test, _ = sources.load_source("mixture2d", split="test").arrays().values()
    assert (train.shape, test.shape) == ((50_000, 2), (10_000, 2))
    assert not set(map(bytes, train)) & set(map(bytes, test))
    np.testing.assert_array_equal(np.bincount(train_labels), 12_500)
    means = np.stack([train[train_labels == c].mean(0) for c in range(4)])
    expected = np.einsum("km,kmd->kd", DEFAULT_MIXTURE.weights, DEFAULT_MIXTURE.means)
    np.testing.assert_allclose(means, expected, atol=0.01)


def test_a_limited_read_of_sorted_classes_is_a_fair_sample():
    labels = np.repeat(np.arange(4), 100)
    source = from_arrays(
        "sorted", split="test", images=np.zeros((400, 1)), labels=labels, class_names=list("abcd")
    )
    assert np.bincount(source.arrays(limit=80)["label"], minlength=4).min() > 8


def test_split_indices_partition_every_group():
    groups = np.repeat([0, 1, 2, 3], [100, 9, 2, 1])
    train = split_indices(groups, split="train", test_fraction=0.1)
    test = split_indices(groups, split="test", test_fraction=0.1)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(112))
    np.testing.assert_array_equal(np.bincount(groups[test], minlength=4), [10, 1, 1, 0])
    assert not np.array_equal(train, np.sort(train))


@pytest.mark.parametrize("name", ["digitz", "npz", "npz:", "folder:", "tfds:", "", "digits:x"])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(UserError, match=r"digits.*photo10.*mixture2d.*npz:PATH.*folder.*tfds"):
        sources.load_source(name)


def test_unknown_split_is_refused():
    with pytest.raises(UserError, match=r"'valid'.*train or test"):
        sources.load_source("digits", split="valid")


@pytest.mark.parametrize(("name", "right"), [("digits", 8), ("photo10", 32)])
def test_fixed_sizes_are_checked(name, right):
    assert sources.load_source(name, image_size=right).shape[0] == right
    with pytest.raises(UserError, match=rf"data.image_size is 64.*{name}.*{right} x {right}"):
        sources.load_source(name, image_size=64)


def test_points_have_no_image_size():
    with pytest.raises(UserError, match=r"data.image_size is 2.*mixture2d"):
        sources.load_source("mixture2d", image_size=2)


@pytest.mark.parametrize(
    ("shape", "most", "count"),
    [
        ((512, 512, 3), 4096, 32),
        ((32, 32, 3), 4096, 4096),
        ((512, 512, 3), 512, 32),
        ((2,), 512, 512),
    ],
)
def test_large_images_are_read_a_few_at_a_time(shape, most, count):
    # 128 MiB hold 42 float32 images of 512 x 512 x 3, which is rounded down to a power of two.
    assert within_memory(shape, most=most) == count


def test_chunks_stay_within_the_memory_limit(monkeypatch):
    monkeypatch.setattr(source, "_BYTES", 64 * 4 * 10)
    read = sources.load_source("digits")
    whole, chunks = read.arrays(), list(read.chunks())
    assert {len(chunk["label"]) for chunk in chunks[:-1]} == {8}
    for name, expected in whole.items():
        np.testing.assert_array_equal(np.concatenate([each[name] for each in chunks]), expected)


@pytest.mark.parametrize("at_hand", [True, False])
def test_known_labels_are_read_without_images(monkeypatch, at_hand):
    monkeypatch.setattr(source, "_BYTES", 64 * 4 * 50)
    digits, sizes = sources.load_source("digits"), []

    def read(indices):
        sizes.append(len(indices))
        return digits.read(indices)

    labels = digits.labels if at_hand else None
    indices = np.arange(3000) % 700
    found = dataclasses.replace(digits, read=read, labels=labels).labels_of(indices)
    np.testing.assert_array_equal(found, digits.read(indices)["label"])
    assert sum(sizes) == (0 if at_hand else 700)
    assert max(sizes, default=0) <= 32
