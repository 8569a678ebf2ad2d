"""The source `arrayrecord:`, ArrayRecord files of tf.train.Example messages, read without TensorFlow."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guided_distill.data.listing import Copy, Place, Row, listed, load_files, reading, shape_of
from guided_distill.data.rows import CAPTION, LABEL, Rows, column, image_column, texts_in
from guided_distill.data.source import Source
from guided_distill.errors import UserError
from guided_distill.files import File

if TYPE_CHECKING:
    from grain.sources import ArrayRecordDataSource

_RECORDS = 64
"""The number of records that are in memory at once while files are listed."""

Values = Mapping[str, Sequence[Any]]
"""The values of each feature of a message."""


def load_arrayrecord(path: str, *, split: str, image_size: int | None) -> Source:
    """Opens ArrayRecord files whose records are messages tf.train.Example, as TFDS writes them.

    The features are the first ones named in IMAGE, LABEL and CAPTION of `data/rows.py`: an image's
    bytes, as in `data/contents.py`; an integer or a string; and one string or several. ArrayRecord
    reads files on a disk only, so the images of files in a bucket are copied to the cache folder. For
    the PATH, see `load_files`.

    Raises:
      UserError: there are no files, or they are damaged or don't fit this description; on reading, an
        image is damaged.
    """
    return load_files(
        path,
        _rows_in,
        kind="arrayrecord",
        suffixes=[".array_record", ".arrayrecord"],
        split=split,
        image_size=image_size,
    )


def _rows_in(name: str, files: Sequence[File]) -> Rows:
    rows = listed(name, files, _scan)
    if any(map(_is_remote, files)):
        return rows
    records = _open([str(file.path) for file in files])

    def content(row: int) -> bytes:
        where = f"{name}: record {row}"
        return _image(_values(records[row], where), where)

    return dataclasses.replace(rows, content=content)


def _is_remote(file: File) -> bool:
    return "://" in str(file.path)


def _scan(number: int, file: File, copy: Copy) -> Iterator[Row]:
    with reading(file, "ArrayRecord"), _on_disk(file) as path:
        records = _open([str(path)])
        for first in range(0, len(records), _RECORDS):
            chosen = range(first, min(first + _RECORDS, len(records)))
            for record, message in zip(chosen, records.__getitems__(list(chosen)), strict=True):
                where = f"{file.path}: record {record}"
                values = _values(message, where)
                image = _image(values, where)
                label, caption = column(values, LABEL), column(values, CAPTION)
                yield Row(
                    shape_of(image, what=where),
                    _as_text(values[label][0], where) if label else None,
                    texts_in([_as_text(text, where) for text in values[caption]], what=where)
                    if caption
                    else None,
                    copy(image) if _is_remote(file) else Place(number, record, 0),
                )


def _open(paths: list[str]) -> "ArrayRecordDataSource":
    # Imported here, because grain takes a while to load and using a model doesn't need it otherwise.
    from grain.sources import ArrayRecordDataSource

    return ArrayRecordDataSource(paths)


@contextlib.contextmanager
def _on_disk(file: File) -> Iterator[Path]:
    """The path of the file on a disk, where it is copied from a bucket meanwhile."""
    if not _is_remote(file):
        yield Path(file.path)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file.path.name
        file.path.copy(path)
        yield path


def _image(values: Values, where: str) -> bytes:
    image = values[image_column(values, where=where)][0]
    if not isinstance(image, bytes):
        raise UserError(f"{where} has the image {image}, but must have the bytes of an image file")
    return image


def _values(message: bytes, where: str) -> Values:
    """The values of each feature that has some. Raises UserError if it isn't a tf.train.Example."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        features = tf_example_pb2.Example.FromString(message).features.feature
    except DecodeError as error:
        raise UserError(
            f"{where} isn't a message tf.train.Example: write records as TensorFlow Datasets does"
        ) from error
    found = {}
    for name, feature in features.items():
        kind = feature.WhichOneof("kind")
        values = getattr(feature, kind).value if kind else ()
        if values:
            found[name] = values
    return found


def _as_text(value: Any, where: str) -> Any:
    """The value, decoded if it is bytes. Raises UserError if they aren't UTF-8."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} has a text that isn't UTF-8: write it in UTF-8") from error
