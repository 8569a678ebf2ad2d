import importlib.resources.abc
import io
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from guided_distill.data import pipeline, sources
from guided_distill.data.pixels import to_uint8
from guided_distill.errors import UserError


def png(image):
    """An encoded PNG file, because TFDS would encode an array with TensorFlow."""
    file = io.BytesIO()
    image.save(file, "png")
    file.seek(0)
    return file


class TinySquares(tfds.core.GeneratorBasedBuilder):
    """Plain gray images of two sizes, labelled with the parity of their shade."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name="even", description="All 12 x 8."),
        tfds.core.BuilderConfig(name="ragged", description="Sizes differ."),
        tfds.core.BuilderConfig(name="gray", description="All 12 x 8, one channel."),
    ]

    def _info(self):
        shapes = {"even": (8, 12, 3), "ragged": (None, None, 3), "gray": (8, 12, 1)}
        features = {
            "image": tfds.features.Image(shape=shapes[self.builder_config.name]),
            "label": tfds.features.ClassLabel(names=["even", "odd"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0), "validation": self._generate_examples(50)}

    def _generate_examples(self, start):
        for shade in range(start, start + 10):
            grow = shade if self.builder_config.name == "ragged" else 0
            mode = "L" if self.builder_config.name == "gray" else "RGB"
            image = Image.new("L", (12 + grow, 8), shade).convert(mode)
            yield shade, {"image": png(image), "label": shade % 2}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for config in ("even", "ragged", "gray"):
        builder = TinySquares(data_dir=folder, config=config, file_format="array_record")
        builder.download_and_prepare()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds.core.constants, "DATA_DIR", str(folder))
        yield


@pytest.mark.parametrize(("split", "start"), [("train", 0), ("test", 50)])
def test_prepared_sets_are_read_without_tensorflow(prepared, split, start):
    source = sources.load_source("tfds:tiny_squares/even", split=split)
    assert source.shape == (8, 12, 3)
    assert source.class_names == ("even", "odd")
    images, labels = source.arrays().values()
    shades = to_uint8(images)[:, 0, 0, 0]
    assert sorted(shades) == list(range(start, start + 10))
    np.testing.assert_array_equal(labels, shades % 2)
    assert "tensorflow" not in sys.modules


def test_images_of_many_sizes_are_resized_and_batched(prepared):
    with pytest.raises(UserError, match=r"tiny_squares/ragged differ.*data\.image_size"):
        sources.load_source("tfds:tiny_squares/ragged")
    source = sources.load_source("tfds:tiny_squares/ragged", image_size=4)
    iterator = pipeline.batches(source, batch_size=10, seed=0)
    batch = next(iterator)
    iterator.close()
    shades = to_uint8(batch["image"])
    assert sorted(shades[:, 2, 2, 0]) == list(range(10))
    np.testing.assert_array_equal(batch["label"], shades[:, 0, 0, 0] % 2)


def test_gray_images_keep_one_channel(prepared):
    source = sources.load_source("tfds:tiny_squares/gray", image_size=5)
    assert source.shape == (5, 5, 1)
    shades = to_uint8(source.arrays()["image"])
    assert sorted(shades[:, 2, 2, 0]) == list(range(10))


def test_sets_not_prepared_say_how_to_prepare(prepared):
    with pytest.raises(UserError, match=r"tfds:cifar10 is not prepared.*download_and_prepare"):
        sources.load_source("tfds:cifar10")


@pytest.mark.parametrize("name", ["no_such_set", "tiny_squares/odd", "tiny_squares/even:7.0.0"])
def test_unknown_sets_are_named(prepared, name):
    with pytest.raises(UserError, match=f"tfds:{name} can't be opened"):
        sources.load_source(f"tfds:{name}")


@pytest.mark.parametrize(
    ("name", "side", "test_split"),
    [("cifar10", 32, "test"), ("imagenet_resized/64x64", 64, "validation")],
)
def test_the_papers_data_sets(tmp_path, monkeypatch, name, side, test_split):
    """The data sets' own features, with a few made-up examples."""
    builder = tfds.builder(name, data_dir=tmp_path, file_format="array_record")
    last = builder.info.features["label"].num_classes - 1
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, side, side, 3), np.uint8)
    wanted = [0, 1, last]

    def examples(count):
        for index in range(count):
            example = {"image": png(Image.fromarray(images[index])), "label": wanted[index]}
            yield index, example | ({"id": "x"} if "id" in builder.info.features else {})

    splits = {"train": examples(3), test_split: examples(1)}
    monkeypatch.setattr(type(builder), "_split_generators", lambda *_: splits)
    # To prepare a set, TFDS imports the module by the name of its backport.
    monkeypatch.setitem(sys.modules, "importlib_resources", importlib.resources)
    builder.download_and_prepare()
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))

    source = sources.load_source(f"tfds:{name}", image_size=side)
    assert (source.shape, source.num_classes) == ((side, side, 3), last + 1)
    found, labels = source.arrays().values()
    assert sorted(labels) == wanted
    places = [wanted.index(label) for label in labels]
    np.testing.assert_array_equal(to_uint8(found), images[places])
    assert len(sources.load_source(f"tfds:{name}", split="test")) == 1


def test_splits_without_labels_are_refused(prepared, monkeypatch):
    source = sources.load_source("tfds:tiny_squares/even")
    for bad in (-1, 2):
        monkeypatch.setattr(
            tfds.features.ClassLabel, "decode_example_np", lambda *_, bad=bad: np.int64(bad)
        )
        with pytest.raises(
            UserError, match=rf"tfds:tiny_squares/even has the label {bad} in .*train"
        ):
            source.arrays()
