import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows_on_disk import pictures, png

from guided_distill import cli
from guided_distill.data import sources
from guided_distill.data.pixels import to_uint8
from guided_distill.errors import UserError

FILES = [png(image) for image in pictures(20)]


@pytest.fixture
def save(tmp_path):
    def save(columns, metadata=None):
        path = tmp_path / "images.parquet"
        table = pa.table(columns)
        pq.write_table(table.replace_schema_metadata(metadata), path)
        return f"parquet:{path}"

    return save


def of_20(name):
    """The images of both splits, uint8, in the order of their labels 0 to 19."""
    examples = [sources.load_source(name, split=split).arrays() for split in sources.SPLITS]
    images = np.concatenate([each["image"] for each in examples])
    labels = np.concatenate([each["label"] for each in examples])
    return to_uint8(images[np.argsort(labels)])


GRAY = pictures(20)[..., 0]
TENSORS = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(pictures(20)))


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (FILES, pictures(20)),
        (pa.array(FILES, pa.large_binary()), pictures(20)),
        ([{"bytes": file, "path": "a.png"} for file in FILES], pictures(20)),
        (pictures(20).tolist(), pictures(20)),
        (
            pa.array(GRAY.tolist(), pa.list_(pa.list_(pa.uint8(), 6), 6)),
            GRAY[..., None],
        ),
        (TENSORS, pictures(20)),
    ],
    ids=["bytes", "large", "struct", "lists", "fixed lists", "tensors"],
)
def test_images_of_every_type_are_read(save, images, expected):
    np.testing.assert_array_equal(of_20(save({"img": images, "label": range(20)})), expected)


def test_files_that_are_named_by_their_paths_are_read(save, tmp_path):
    for number, file in enumerate(FILES):
        (tmp_path / f"{number}.png").write_bytes(file)
    rows = [{"bytes": None, "path": f"{tmp_path}/{number}.png"} for number in range(20)]
    np.testing.assert_array_equal(of_20(save({"image": rows, "label": range(20)})), pictures(20))
    (tmp_path / "7.png").rename(tmp_path / "gone.png")
    with pytest.raises(UserError, match=r"row 7 is the file .*7\.png, which can't be read"):
        sources.load_source(save({"image": rows, "label": [0] * 20}))


def test_names_of_classes_are_those_of_the_library_datasets(save):
    feature = {"_type": "ClassLabel", "names": ["ant", "bee"]}
    about = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
    source = sources.load_source(save({"image": FILES, "label": [1, 0] * 10}, about))
    assert source.class_names == ("ant", "bee")


def test_strings_as_labels_name_their_classes(save):
    source = sources.load_source(save({"image": FILES, "label": ["cow", "ant"] * 10}))
    assert source.class_names == ("ant", "cow")
    for image, label in zip(*source.arrays().values(), strict=True):
        (row,) = np.flatnonzero((pictures(20) == to_uint8(image)).all((1, 2, 3)))
        assert label == (row + 1) % 2


def test_strings_as_labels_are_the_same_classes_in_both_splits(tmp_path):
    for split, labels in {"train": ["cow", "ant"], "test": ["bee", "cow"]}.items():
        table = pa.table({"image": FILES[:2], "label": labels})
        pq.write_table(table, tmp_path / f"{split}.parquet")
    name = f"parquet:{tmp_path}/{{split}}.parquet"
    found = [sources.load_source(name, split=split) for split in sources.SPLITS]
    assert [source.class_names for source in found] == [("ant", "bee", "cow")] * 2
    assert [list(source.arrays()["label"]) for source in found] == [[2, 0], [1, 2]]


@pytest.mark.parametrize("split", sources.SPLITS)
def test_labels_of_one_split_alone_are_refused(tmp_path, split):
    pq.write_table(pa.table({"image": FILES, "label": [0] * 20}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"image": FILES}), tmp_path / "test.parquet")
    with pytest.raises(
        UserError, match=r"test\.parquet has no labels, but the other split has: add"
    ):
        sources.load_source(f"parquet:{tmp_path}/{{split}}.parquet", split=split)


def test_images_alone_are_one_class_without_captions(save):
    source = sources.load_source(save({"image": FILES}))
    assert (source.class_names, source.captions) == (("0",), None)
    assert set(source.arrays()["label"]) == {0}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": FILES, "id": range(20)}, r"no column of images, only id, picture: name the"),
        ({"image": range(20)}, r"its images are int64, but must be the bytes"),
        ({"image": ["a.png"] * 20}, r"its images are string, but must be"),
        ({"image": [None, *FILES[1:]]}, r"the image of row 0 is missing: remove that row"),
        ({"image": [*FILES[:3], b"", *FILES[4:]]}, r"row 3 can't be read as an image"),
        (
            {"image": [[[[1, 2]]], [[[1, 2]]]]},
            r"row 0 can't be read as an array.*uint8 \[1, 1, 2\]",
        ),
        ({"image": [[[[1]], [[2, 3]]]] * 2}, r"row 0 isn't rectangular"),
        ({"image": [[[[300]]]] * 2}, r"int64 \[1, 1, 1\]"),
        (
            {"image": FILES, "label": [None, *range(19)]},
            r"row 0 has the label None: give every row",
        ),
        ({"image": FILES, "label": [*range(19), None]}, r"row 19 has the label None"),
        (
            {"image": FILES, "label": [0.5] * 20},
            r"row 0 has the label 0\.5: give every row an integer",
        ),
        ({"image": FILES, "text": [7] * 20}, r"row 0 has the caption 7: give a string"),
        ({"image": FILES, "text": [*["a"] * 19, None]}, r"row 19 has no caption, but others have"),
        ({"image": FILES[:1]}, "too few images for a test split"),
        ({"image": pa.array([], pa.binary())}, r"has no images: give files that hold some"),
    ],
)
def test_bad_columns_are_named(save, columns, message):
    with pytest.raises(UserError, match=rf"^\S*images\.parquet\S* .*{message}"):
        sources.load_source(save(columns), split="test")


def test_without_pyarrow_the_extra_is_named(save, monkeypatch, capsys):
    name = save({"image": FILES})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    arguments = ["train", "--config=configs/digits.py", f"--config.data.name={name}"]
    assert cli.main([*arguments, f"--workdir={name.partition(':')[2]}.run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs the package pyarrow: pip install pyarrow (the extra `parquet`)" in line
