"""The source `hf:`, data sets of the Hugging Face Hub, downloaded and opened by the library datasets."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from guided_distill.data.arrow import class_names_in, contents
from guided_distill.data.rows import (
    CAPTION,
    LABEL,
    Rows,
    captions_of,
    column,
    image_column,
    labels_of,
    source_of_rows,
    texts_in,
)
from guided_distill.data.source import Source
from guided_distill.errors import UserError
from guided_distill.storage import first_line

if TYPE_CHECKING:
    import datasets

_NAME = re.compile(r"(?P<id>[^:@]+)(?::(?P<config>[^@]+))?(?:@(?P<revision>.+))?")
_TESTS = ("test", "validation", "valid", "val")


def load_hf(name: str, *, split: str, image_size: int | None) -> Source:
    """Opens a data set of the Hub, or a folder in its layout, by ID[:CONFIG][@REVISION].

    The library downloads it once and keeps it in its own cache, where every row has random access; then
    it needs no network. The columns are the first ones named in IMAGE, LABEL and CAPTION of
    `data/rows.py`, of the types in `data/arrow.py`. The test split is the set's `test`, or else its
    `validation`, if its labels are known, which the Hub marks by -1 where they aren't; if there is
    neither, it is a tenth of `train`, the same rows as for `npz:`.

    Raises:
      UserError: the library isn't installed, or the set can't be downloaded or doesn't fit this
        description; on reading, an image is damaged or has another size than the first.
    """
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise UserError(
            f"hf:{name} needs the package datasets: pip install datasets (the extra `hf`)"
        ) from None
    if "://" in name:
        raise UserError(f"hf:{name} is in a bucket, and hf: reads the Hub: give parquet:{name}")
    sets = _loaded(name)
    if "train" not in sets:
        raise UserError(
            f"hf:{name} has no split train, only {', '.join(sorted(sets))}: choose another"
        )
    train = _rows_in(sets["train"], f"hf:{name}")
    tests = (_rows_in(sets[each], f"hf:{name}") for each in _TESTS if each in sets)
    test = next((rows for rows in tests if _has_labels(rows)), None)
    if test is None:
        return source_of_rows(f"hf:{name}", train, split=split, image_size=image_size, whole=False)
    rows, other = (test, train) if split == "test" else (train, test)
    return source_of_rows(
        f"hf:{name}", rows, split=split, image_size=image_size, other=other, whole=True
    )


def _has_labels(rows: Rows) -> bool:
    """Whether no label is unknown."""
    labels = rows.labels
    return labels is None or labels.dtype.kind == "U" or bool((labels != -1).all())


def _loaded(name: str) -> "Mapping[str, datasets.Dataset]":
    """The splits of a data set by their names."""
    import datasets

    parts = _NAME.fullmatch(name)
    if parts is None:
        raise UserError(f"hf:{name} isn't a name: give hf:ID, hf:ID:CONFIG or hf:ID@REVISION")
    try:
        return datasets.load_dataset(parts["id"], parts["config"], revision=parts["revision"])
    except (
        Exception
    ) as error:  # The library, the network and damaged files raise errors of many types.
        raise UserError(
            f"hf:{name} can't be opened ({first_line(error)}): check its name, the network, and your "
            f"access to it"
        ) from error


def _rows_in(data: "datasets.Dataset", where: str) -> Rows:
    arrow = data.with_format("arrow")
    names: Sequence[str] = data.column_names
    image, label, caption = (
        image_column(names, where=where),
        column(names, LABEL),
        column(names, CAPTION),
    )

    def values(name: str | None) -> list[Any]:
        return (
            arrow.select_columns([name])[:].column(name).to_pylist() if name else [None] * len(data)
        )

    images = arrow.select_columns([image])

    def content(row: int) -> bytes:
        column_of_one = images[row].column(image).combine_chunks()
        return next(contents(column_of_one, where=where, first=row))

    texts = [texts_in(each, what=f"{where}: row {row}") for row, each in enumerate(values(caption))]
    return Rows(
        where=where,
        content=content,
        size=len(data),
        labels=labels_of(values(label), where=where),
        captions=captions_of(texts, where=where),
        class_names=class_names_in(data.features.arrow_schema, label) if label else None,
    )
