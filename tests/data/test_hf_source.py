import sys

import datasets
import numpy as np
import pytest
from rows_on_disk import pictures, png

from guided_distill.data import sources
from guided_distill.data.pixels import to_uint8
from guided_distill.errors import UserError

pytestmark = pytest.mark.usefixtures("own_datasets")

FEATURES = datasets.Features(
    {
        "img": datasets.Image(),
        "label": datasets.ClassLabel(names=["ant", "bee", "cow"]),
        "caption": datasets.List(datasets.Value("string")),
    }
)


@pytest.fixture
def save(tmp_path):
    """Writes splits of rows as the library writes them for the Hub. Returns the source's name."""

    def save(features=FEATURES, **splits):
        for split, columns in splits.items():
            data = datasets.Dataset.from_dict(columns, features=features)
            data.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
        return f"hf:{tmp_path}"

    return save


def rows(start, stop):
    return {
        "img": [{"bytes": png(image), "path": None} for image in pictures()[start:stop]],
        "label": [row % 3 for row in range(start, stop)],
        "caption": [[f"{row}", f"{row} again"] for row in range(start, stop)],
    }


@pytest.mark.parametrize("other", ["test", "validation"])
def test_splits_of_the_hub_are_used_as_they_are(save, other):
    name = save(train=rows(0, 30), **{other: rows(30, 40)})
    for split, chosen in {"train": range(30), "test": range(30, 40)}.items():
        source = sources.load_source(name, split=split)
        assert source.class_names == ("ant", "bee", "cow")
        assert list(source.captions) == [f"{row}{end}" for row in chosen for end in ("", " again")]
        examples = source.arrays()
        np.testing.assert_array_equal(
            to_uint8(examples["image"]), np.repeat(pictures()[list(chosen)], 2, axis=0)
        )
        np.testing.assert_array_equal(examples["label"], np.repeat(chosen, 2) % 3)


def test_a_test_split_without_labels_is_not_used(save):
    unknown = rows(30, 40) | {"label": [-1] * 10}
    name = save(train=rows(0, 20), validation=rows(20, 30), test=unknown)
    source = sources.load_source(name, split="test")
    np.testing.assert_array_equal(source.labels, np.repeat(range(20, 30), 2) % 3)


def test_arrays_of_pixels_are_read(save):
    features = datasets.Features({"image": datasets.Array3D((6, 6, 3), "uint8")})
    name = save(features, train={"image": pictures()}, test={"image": pictures(5)})
    found = sources.load_source(name).arrays()["image"]
    np.testing.assert_array_equal(to_uint8(found), pictures())


def test_images_of_another_size_are_named(save):
    features = datasets.Features({"image": datasets.Image()})
    images = [*pictures(5), *pictures(1, size=(6, 7))]
    columns = {"image": [{"bytes": png(image), "path": None} for image in images]}
    name = save(features, train=columns, test=columns)
    source = sources.load_source(name)
    with pytest.raises(
        UserError, match=rf"^{name}: the image of row 5 is 6 x 7 x 3, but the first is"
    ):
        source.arrays()
    assert sources.load_source(name, image_size=4).arrays()["image"].shape == (6, 4, 4, 3)


def test_columns_that_are_missing_are_named(save):
    features = datasets.Features({"picture": datasets.Image(), "id": datasets.Value("int32")})
    columns = {"picture": rows(0, 3)["img"], "id": range(3)}
    with pytest.raises(UserError, match=r"^hf:\S* has no column of images, only id, picture: name"):
        sources.load_source(save(features, train=columns))
    with pytest.raises(UserError, match=r"^hf:\S* row 2 has no caption, but others have one"):
        sources.load_source(
            save(train=rows(0, 2) | {}, test=rows(0, 3) | {"caption": [["a"], ["a"], []]})
        )


def test_a_set_without_training_images_is_refused(save):
    with pytest.raises(UserError, match=r"has no split train, only test: choose another"):
        sources.load_source(save(test=rows(0, 9)))


@pytest.mark.parametrize("name", ["hf:nobody/nothing", "hf:nobody/nothing:small@main"])
def test_a_missing_network_is_one_sentence(name):
    with pytest.raises(
        UserError, match=rf"^{name} can't be opened \(Couldn't reach .*: check its name"
    ):
        sources.load_source(name)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (":x", r"hf::x isn't a name: give hf:ID"),
        ("gs://bucket/x", r"is in a bucket, .* give parquet:gs://bucket/x"),
    ],
)
def test_names_that_cannot_be_are_refused(place, message):
    with pytest.raises(UserError, match=message):
        sources.load_source(f"hf:{place}")


def test_a_config_that_is_missing_is_named(save):
    name = save(train=rows(0, 9))
    with pytest.raises(UserError, match=r"BuilderConfig 'small' not found"):
        sources.load_source(f"{name}:small")


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install datasets \(the extra `hf`\)$"):
        sources.load_source("hf:cifar10")
