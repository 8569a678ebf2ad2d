import re
from pathlib import Path

import numpy as np
import pytest
from rows_on_disk import example, pictures, png, write_records

from guided_distill.data import sources
from guided_distill.data.pixels import to_uint8
from guided_distill.errors import UserError

FILES = [png(image) for image in pictures(20)]


@pytest.fixture
def save(tmp_path):
    def save(messages):
        write_records(tmp_path / "images.array_record", messages)
        return f"arrayrecord:{tmp_path}/images.array_record"

    return save


def test_strings_as_labels_name_their_classes(save):
    kinds = [b"cow", b"ant"] * 10
    name = save(
        [example(image=[file], label=[kind]) for file, kind in zip(FILES, kinds, strict=True)]
    )
    source = sources.load_source(name)
    assert (source.class_names, source.captions) == (("ant", "cow"), None)
    for image, label in zip(*source.arrays().values(), strict=True):
        (row,) = np.flatnonzero((pictures(20) == to_uint8(image)).all((1, 2, 3)))
        assert label == (row + 1) % 2


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([b"\xff\xff"], r"record 0 isn't a message tf\.train\.Example: write records as"),
        ([example(picture=[b"x"], id=[1])], r"record 0 has no column of images, only id, picture:"),
        (
            [example(image=[FILES[0]]), example(image=[])],
            r"record 1 has no column of images, only none",
        ),
        ([example(image=[7])], r"record 0 has the image 7, but must have the bytes"),
        ([example(image=[b"x"])], r"record 0 can't be read as an image"),
        ([example(image=[FILES[0]], caption=[b"\xff"])], r"record 0 has a text that isn't UTF-8"),
        ([example(image=[FILES[0]], caption=[7])], r"record 0 has the caption 7: give a string"),
        (
            [example(image=[FILES[0]], label=[1]), example(image=[FILES[0]])],
            r"row 1 has the label None: give every row an integer",
        ),
    ],
)
def test_bad_records_are_named(save, messages, message):
    with pytest.raises(UserError, match=rf"^\S*images\.array_record: {message}"):
        sources.load_source(save(messages))


def test_the_documents_write_such_files(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    for name, file in zip(("a.png", "b.jpg"), FILES, strict=False):
        (tmp_path / name).write_bytes(file)
    exec(program, {})
    name = "arrayrecord:birds.array_record"
    found = [sources.load_source(name, split=split) for split in sources.SPLITS]
    assert sorted(text for source in found for text in source.captions) == ["a heron", "a wren"]
    assert [source.class_names for source in found] == [("0", "1")] * 2
