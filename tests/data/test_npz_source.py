import numpy as np
import pytest

from guided_distill.data import sources
from guided_distill.data.pixels import from_uint8, to_uint8
from guided_distill.errors import UserError


def pixels(count, *, size=4, channels=3, start=0):
    """Images whose every value is their own index."""
    index = np.arange(start, start + count, dtype=np.uint8)
    return np.broadcast_to(index[:, None, None, None], (count, size, size, channels))


@pytest.fixture
def save(tmp_path):
    def save(**fields):
        path = tmp_path / "images.npz"
        np.savez(path, **fields)
        return f"npz:{path}"

    return save


def test_a_tenth_is_held_out_and_labels_stay_with_their_images(save):
    name = save(image=pixels(50), label=np.arange(50) % 7)
    parts = {split: sources.load(name, split=split) for split in ("train", "test")}
    assert (len(parts["train"]), len(parts["test"])) == (45, 5)
    seen = []
    for source in parts.values():
        images, labels = source.arrays()
        index = to_uint8(images)[:, 0, 0, 0]
        np.testing.assert_array_equal(labels, index % 7)
        seen += list(index)
        assert source.shape == (4, 4, 3)
        assert source.num_classes == 7
    assert sorted(seen) == list(range(50))


def test_own_test_arrays_and_names_are_used_as_they_are(save):
    name = save(
        images=pixels(6),
        labels=np.zeros(6, np.uint8),
        test_images=pixels(3, start=100),
        test_labels=np.array([1, 0, 2]),
        class_names=np.array(["ant", "bee", "cow"]),
    )
    assert len(sources.load(name)) == 6
    test = sources.load(name, split="test")
    images, labels = test.arrays()
    np.testing.assert_array_equal(images, from_uint8(pixels(3, start=100)))
    np.testing.assert_array_equal(labels, [1, 0, 2])
    assert test.class_names == sources.load(name).class_names == ("ant", "bee", "cow")


def test_both_splits_know_the_classes_of_either(save):
    labels = {"label": np.arange(3), "test_label": np.array([4])}
    name = save(image=pixels(3), test_image=pixels(1), **labels)
    assert [sources.load(name, split=split).num_classes for split in sources.SPLITS] == [5, 5]


def test_gray_images_gain_a_channel_and_float_images_are_kept(save):
    gray = np.linspace(-1, 1, 10 * 25, dtype=np.float32).reshape(10, 5, 5)
    source = sources.load(save(image=gray), image_size=5)
    assert source.shape == (5, 5, 1)
    assert source.num_classes == 1
    found = {bytes(image) for image in source.arrays()[0]}
    assert found < {bytes(image) for image in gray}


def test_wrong_image_size_says_the_size(save):
    with pytest.raises(UserError, match=r"data.image_size is 8.*4 x 4 x 3"):
        sources.load(save(image=pixels(20)), image_size=8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"picture": np.zeros(3)}, r"no field `image`.*picture"),
        ({"image": pixels(5).astype(np.int64)}, r"uint8 or float32.*int64"),
        ({"image": np.zeros((5, 4), np.uint8)}, r"\[N, H, W\].*\[5, 4\]"),
        ({"image": pixels(5).astype(np.float32)}, r"\[-1, 1\]"),
        ({"image": np.full((5, 2, 2), np.nan, np.float32)}, r"\[-1, 1\]"),
        ({"image": pixels(5), "label": np.zeros(4, int)}, r"integers \[5\].*\[4\]"),
        ({"image": pixels(5), "label": np.zeros(5)}, r"integers \[5\].*float64"),
        ({"image": pixels(5), "label": np.full(5, -1)}, r"non-negative"),
        ({"image": pixels(1)}, r"no images for the test split"),
        ({"image": pixels(0)}, r"no images for the test split"),
        (
            {"image": pixels(5), "label": np.zeros(5, int), "test_image": pixels(2)},
            r"no `test_label`",
        ),
        ({"image": pixels(5), "test_image": pixels(2, size=5)}, r"make them one size"),
        (
            {"image": pixels(5), "label": np.arange(5), "class_names": np.array(["a"])},
            r"class_names has 1",
        ),
    ],
)
def test_bad_fields_are_named(save, fields, message):
    with pytest.raises(UserError, match=rf"images\.npz.*{message}"):
        sources.load(save(**fields), split="test")


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no file .*none\.npz"):
        sources.load(f"npz:{tmp_path}/none.npz")
    damaged = {"text.npz": b"not an archive", "cut.npz": b"PK\x03\x04 cut", "empty.npz": b""}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "single.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", image=np.array([{}], dtype=object))
    for name in (*damaged, "single.npy", "objects.npz"):
        with pytest.raises(UserError, match=rf"{name} cannot be read"):
            sources.load(f"npz:{tmp_path}/{name}")
