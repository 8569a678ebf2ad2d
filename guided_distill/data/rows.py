"""Data sets row by row: an image, its label and its captions, in whatever format they are stored.

`data/parquet.py`, `arrayrecord.py`, `webdataset.py` and `datasets_library.py` read the formats.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from guided_distill.data.classes import checked_labels, names_of_classes
from guided_distill.data.contents import pixels_in
from guided_distill.data.pixels import from_uint8
from guided_distill.data.source import (
    TEST_FRACTION,
    Examples,
    Source,
    check_image_size,
    split_indices,
)
from guided_distill.errors import UserError
from guided_distill.files import is_text

IMAGE = ("image", "images", "img", "jpg", "jpeg", "png", "webp", "npy")
LABEL = ("label", "labels", "cls", "class", "fine_label")
CAPTION = ("caption", "captions", "text", "texts", "txt")
"""Names of the columns of a row; the first one that there is counts."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows [N] of one file or several; `where` names them in errors.

    content: f(row) -> the image's bytes, as in `data/contents.py`. Several threads call it. labels:
    integers or strings [N], or None. captions: one list of texts per row, or None. class_names: the
    names of integer labels, or None. shapes: each image's [H, W, C], [N, 3], or None if unknown.
    """

    where: str
    content: Callable[[int], bytes]
    size: int
    labels: np.ndarray | None
    captions: Sequence[Sequence[str]] | None
    class_names: Sequence[str] | None = None
    shapes: np.ndarray | None = None

    def what(self, row: int) -> str:
        """The name of a row's image in errors."""
        return f"{self.where}: the image of row {row}"

    def pixels(self, row: int, image_size: int | None) -> np.ndarray:
        """A row's image, as `pixels_in` returns it."""
        return pixels_in(self.content(row), what=self.what(row), image_size=image_size)


def column(names: Collection[str], kinds: Sequence[str]) -> str | None:
    """The first of `kinds` among the names, if any."""
    return next((kind for kind in kinds if kind in names), None)


def image_column(names: Collection[str], *, where: str) -> str:
    """The name of the column of images. Raises UserError, which lists the columns, if there is none."""
    if (found := column(names, IMAGE)) is None:
        raise UserError(
            f"{where} has no column of images, only {', '.join(sorted(names)) or 'none at all'}: name "
            f"the column of images `{IMAGE[0]}`"
        )
    return found


def source_of_rows(
    name: str,
    rows: Rows,
    *,
    split: str,
    image_size: int | None,
    other: Rows | None = None,
    whole: bool,
) -> Source:
    """The source of one split of some rows. A row with several captions is one example for each of them.

    Args:
      name: the source's name.
      image_size: see `load_source`.
      other: the rows of the other split, if it has its own; their labels count as classes too.
      whole: whether all rows are in the split; otherwise a tenth of them is held out, in the same order
        as `npz:` holds them out.

    Raises:
      UserError: there are no rows, sizes differ, or labels or captions don't fit `Rows`.
    """
    picks = np.arange(rows.size)
    if not whole:
        groups = np.zeros(rows.size, int)
        picks = split_indices(groups, split=split, test_fraction=TEST_FRACTION)
    if not len(picks):
        raise UserError(f"{rows.where} has too few images for a {split} split: add some")
    labels, class_names = _classes(rows, other)
    first = rows.pixels(0, image_size)
    if image_size is None:
        _check_one_shape(rows, first.shape)
    captions = None
    if rows.captions is not None:
        texts = [rows.captions[int(row)] for row in picks]
        captions = np.array([text for each in texts for text in each], object)
        picks = np.repeat(picks, [len(each) for each in texts])

    def pixels(row: int) -> np.ndarray:
        found = rows.pixels(row, image_size)
        if found.shape != first.shape or found.dtype != first.dtype:
            raise _differ(rows, row, found.shape, first.shape)
        return found

    def read(indices: np.ndarray) -> Examples:
        chosen = picks[indices]
        images = np.stack([pixels(int(row)) for row in chosen])
        as_floats = from_uint8(images) if images.dtype == np.uint8 else images
        return {"image": as_floats, "label": labels[chosen]}

    source = Source(
        name=name,
        split=split,
        shape=first.shape,
        size=len(picks),
        class_names=tuple(class_names),
        read=read,
        captions=captions,
        labels=labels[picks],
    )
    check_image_size(source, image_size)
    return source


def _check_one_shape(rows: Rows, shape: tuple[int, ...]) -> None:
    if rows.shapes is None:
        return
    others = np.flatnonzero(np.any(rows.shapes != shape, axis=1))
    if len(others):
        raise _differ(rows, int(others[0]), tuple(rows.shapes[others[0]]), shape)


def _differ(rows: Rows, row: int, found: Sequence[int], expected: Sequence[int]) -> UserError:
    return UserError(
        f"{rows.what(row)} is {' x '.join(map(str, found))}, but the first is "
        f"{' x '.join(map(str, expected))}: set data.image_size to resize all images"
    )


def _classes(rows: Rows, other: Rows | None) -> tuple[np.ndarray, list[str]]:
    """The labels, int32 [N], and the names of their classes."""
    both = [rows] if other is None else [rows, other]
    labels = [each.labels for each in both if each.labels is not None]
    if not labels:
        return np.zeros(rows.size, np.int32), ["0"]
    if len(labels) < len(both):
        lacking = next(each for each in both if each.labels is None)
        raise UserError(f"{lacking.where} has no labels, but the other split has: add them")
    if all(each.dtype.kind == "U" for each in labels):
        names, numbers = np.unique(np.concatenate(labels), return_inverse=True)
        return numbers[: rows.size].astype(np.int32), [str(name) for name in names]
    checked = [
        checked_labels(each, owner.size, where=f"{owner.where}: label")
        for each, owner in zip(labels, both, strict=True)
    ]
    return checked[0], names_of_classes(rows.class_names, checked, path=rows.where)


def labels_of(found: Sequence[object], *, where: str) -> np.ndarray | None:
    """The labels of rows, integers or strings [N], or None if no row has one.

    Raises UserError if only some rows have one, or if they are neither integers nor strings.
    """
    if all(label is None for label in found):
        return None
    of_first = int if type(found[0]) is int else str
    for row, label in enumerate(found):
        fits = is_text(label) if of_first is str else type(label) is int and abs(label) < 2**63
        if not fits:
            raise UserError(
                f"{where}: row {row} has the label {label!a:.50}: give every row an integer, or every "
                f"row a string"
            )
    return np.array(found)


def captions_of(
    found: Sequence[Sequence[str] | None], *, where: str
) -> Sequence[Sequence[str]] | None:
    """The captions of rows, at least one each, or None if no row has one.

    Raises UserError if only some rows have captions.
    """
    if not any(found):
        return None
    for row, texts in enumerate(found):
        if not texts:
            raise UserError(f"{where}: row {row} has no caption, but others have one: add it")
    return [texts for texts in found if texts]


def texts_in(value: object, *, what: str) -> tuple[str, ...] | None:
    """The captions in a value: a string, a list of strings, or None. Raises UserError for others."""
    if value is None:
        return None
    texts = tuple(value) if isinstance(value, list | tuple) else (value,)
    for text in texts:
        if not is_text(text):
            raise UserError(
                f"{what} has the caption {text!a:.50}: give a string, or a list of strings"
            )
    return texts
