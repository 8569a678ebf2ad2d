"""The source `parquet:`, images in columns of Parquet files, as data sets on the Hugging Face Hub are."""

import dataclasses
from collections.abc import Iterator, Sequence

from guided_distill.data.arrow import class_names_in, contents
from guided_distill.data.listing import Copy, Row, listed, load_files, reading, shape_of
from guided_distill.data.rows import CAPTION, LABEL, Rows, column, image_column, texts_in
from guided_distill.data.source import Source
from guided_distill.errors import UserError
from guided_distill.files import File

_ROWS = 64
"""The number of rows that are in memory at once."""


def load_parquet(path: str, *, split: str, image_size: int | None) -> Source:
    """Opens Parquet files with a column of images and, optionally, of labels and captions.

    The columns are the first ones named in IMAGE, LABEL and CAPTION of `data/rows.py`, of the types in
    `data/arrow.py`. The names of classes are those in the metadata of the library datasets, or the
    labels themselves if they are strings. Compressed columns have no random access, so the first
    opening copies the images to the cache folder. For the PATH, see `load_files`.

    Raises:
      UserError: pyarrow isn't installed, there are no files, or they are damaged or don't fit this
        description; on reading, an image is damaged.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError(
            f"parquet:{path} needs the package pyarrow: pip install pyarrow (the extra `parquet`)"
        ) from None
    return load_files(
        path, _rows_in, kind="parquet", suffixes=[".parquet"], split=split, image_size=image_size
    )


def _rows_in(name: str, files: Sequence[File]) -> Rows:
    from pyarrow import parquet

    rows = listed(name, files, _scan)
    with reading(files[0], "Parquet"), files[0].path.open("rb") as stream:
        schema = parquet.read_schema(stream)
    label = column(schema.names, LABEL)
    names = None if label is None else class_names_in(schema, label)
    return dataclasses.replace(rows, class_names=names)


def _scan(_: int, file: File, copy: Copy) -> Iterator[Row]:
    from pyarrow import parquet

    where = str(file.path)
    with reading(file, "Parquet"), file.path.open("rb") as stream:
        table = parquet.ParquetFile(stream)
        names = table.schema_arrow.names
        image = image_column(names, where=where)
        label, caption = column(names, LABEL), column(names, CAPTION)
        columns = [name for name in (image, label, caption) if name is not None]
        first = 0
        for batch in table.iter_batches(batch_size=_ROWS, columns=columns):
            images = contents(batch.column(image), where=where, first=first)
            labels = batch.column(label).to_pylist() if label else [None] * len(batch)
            captions = batch.column(caption).to_pylist() if caption else [None] * len(batch)
            for row, content in enumerate(images):
                what = f"{where}: row {first + row}"
                yield Row(
                    shape_of(content, what=f"{where}: the image of row {first + row}"),
                    labels[row],
                    texts_in(captions[row], what=what),
                    copy(content),
                )
            first += len(batch)
