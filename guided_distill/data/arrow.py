"""Columns of Apache Arrow, as Parquet files and the library datasets have them.

An image is an image file's bytes, a struct {bytes, path}, or an array: a list of rows of pixels, or a
fixed-shape tensor. A label is an integer or a string, a caption a string or a list of strings.
"""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from guided_distill.data.contents import array_bytes
from guided_distill.errors import UserError
from guided_distill.places import path_named

if TYPE_CHECKING:
    import pyarrow as pa


def class_names_in(schema: "pa.Schema", label: str) -> list[str] | None:
    """The names of a column's classes in the metadata that the library datasets writes, if any."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        names = about["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def contents(column: "pa.Array", *, where: str, first: int = 0) -> Iterator[bytes]:
    """The bytes of each image of a column, as in `data/contents.py`.

    where: the name of the data in errors. first: the number of the column's first row. Raises UserError
    for a column of another type, for a row without an image, and for an array that isn't an image's.
    """
    import pyarrow as pa

    if isinstance(column, pa.FixedShapeTensorArray):
        for tensor in column.to_numpy_ndarray():
            yield array_bytes(_as_pixels(tensor))
        return
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    for row, value in enumerate(column, start=first):
        what = f"{where}: the image of row {row}"
        if pa.types.is_struct(column.type):
            yield _of_struct(value.as_py() or {}, what)
        elif pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            yield _given(value.as_py(), what)
        elif _is_list(column.type):
            yield array_bytes(_as_pixels(_nested(value, what)))
        else:
            raise UserError(
                f"{where}: its images are {column.type}, but must be the bytes of image files, or lists "
                f"of pixels [H, W, C]"
            )


def _of_struct(value: dict[str, Any], what: str) -> bytes:
    """The bytes of a struct {bytes, path}, or those of the file on this machine that it names."""
    if value.get("bytes") is None and value.get("path"):
        path = path_named(value["path"])
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(
                f"{what} is the file {path}, which can't be read: embed the files' bytes"
            ) from error
    return _given(value.get("bytes"), what)


def _given(content: bytes | None, what: str) -> bytes:
    if content is None:
        raise UserError(f"{what} is missing: remove that row, or add the image")
    return content


def _is_list(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _nested(value: "pa.Scalar", what: str) -> np.ndarray:
    """The array of one row of nested lists. Raises UserError if the lists differ in length."""
    import pyarrow.compute as pc

    if not value.is_valid:
        raise UserError(f"{what} is missing: remove that row, or add the image")
    values = value.values
    shape = [len(values)]
    while _is_list(values.type):
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(lengths) != 1 or lengths[0] is None:
            raise UserError(f"{what} isn't rectangular: its lists differ in length")
        shape.append(lengths[0])
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).reshape(shape)


def _as_pixels(array: np.ndarray) -> np.ndarray:
    """The array, as uint8 if it holds integers from 0 to 255."""
    if array.size and array.dtype.kind in "iu" and array.min() >= 0 and array.max() <= 255:
        return array.astype(np.uint8)
    return array
