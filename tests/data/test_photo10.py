import numpy as np
import pytest

from guided_distill.data import photo10, sources
from guided_distill.data.pixels import to_uint8
from guided_distill.errors import UserError


@pytest.fixture
def fresh_photos():
    photo10._patches.cache_clear()
    yield
    photo10._patches.cache_clear()


def coded_photo(package, file):
    """A photograph whose every pixel encodes its position: x, y, and the ninth bits of both."""
    y, x = np.mgrid[:300, :500]
    return np.stack([x % 256, y % 256, x // 256 * 64 + y // 256 * 128], axis=-1).astype(np.uint8)


def test_train_and_test_share_no_pixel(monkeypatch, fresh_photos):
    monkeypatch.setattr(photo10, "_half_size", coded_photo)
    seen = {}
    for split in sources.SPLITS:
        source = sources.load_source("photo10", split=split)
        pixels = to_uint8(source.read(np.arange(0, len(source), 10))["image"]).astype(int)
        x = pixels[..., 0] + 256 * (pixels[..., 2] % 128 // 64)
        y = pixels[..., 1] + 256 * (pixels[..., 2] // 128)
        # A patch is a contiguous piece of the photograph, neither rotated nor mirrored.
        assert (np.diff(x, axis=2) == 1).all()
        assert (np.diff(y, axis=1) == 1).all()
        assert (x[:, 0, 0] % photo10.STRIDE == 0).all()
        seen[split] = set(zip(x.ravel(), y.ravel(), strict=True))
    assert not seen["train"] & seen["test"]
    assert len(seen["train"] | seen["test"]) > 0.85 * 300 * 500
    assert len(seen["test"]) > 0.15 * len(seen["train"])


def test_classes_alternate_and_every_patch_is_used():
    source = sources.load_source("photo10", split="test")
    labels = source.arrays()["label"]
    np.testing.assert_array_equal(labels, np.arange(len(source)) % 10)
    for label in (1, 6):
        dealt = to_uint8(source.read(np.arange(label, len(source), 10))["image"])
        patches = photo10._patches("test")[label]
        assert set(map(bytes, dealt)) == set(map(bytes, patches))


def test_there_are_thousands_of_patches_and_none_is_flat():
    total = {split: sum(map(len, photo10._patches(split))) for split in sources.SPLITS}
    assert total["train"] > 9000
    assert total["test"] > 1500
    for patches in photo10._patches("train"):
        assert patches.shape[1:] == (32, 32, 3)
        assert patches.std(axis=(1, 2, 3)).min() >= 8


def test_photographs_have_their_colours():
    source = sources.load_source("photo10", split="train")
    images, labels = source.arrays(limit=5000).values()
    colour = {
        name: images[labels == i].mean(axis=(0, 1, 2)) for i, name in enumerate(source.class_names)
    }
    retina_red, retina_green, retina_blue = colour["retina"]
    assert retina_red > retina_green > retina_blue
    assert colour["rocket"][2] > colour["rocket"][0]
    assert colour["galaxies"].max() < -0.7
    assert colour["temple"].min() > -0.3


def test_missing_packages_are_named(monkeypatch, fresh_photos):
    monkeypatch.setitem(photo10.PHOTOS, "cat", ("not_installed", "data/cat.png"))
    with pytest.raises(UserError, match="pip install scikit-image scikit-learn"):
        sources.load_source("photo10")


def test_a_missing_photograph_is_named(monkeypatch, fresh_photos):
    monkeypatch.setitem(photo10.PHOTOS, "cat", ("skimage", "data/no_cat.png"))
    with pytest.raises(UserError, match=r"no_cat\.png.*reinstall scikit-image"):
        sources.load_source("photo10")
