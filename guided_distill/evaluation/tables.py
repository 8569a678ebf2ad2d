"""Tables of dataclass instances as csv files, one column per field; read and written without JAX."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from etils import epath

from guided_distill import kinds
from guided_distill.errors import UserError
from guided_distill.storage import first_line, write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Entry = TypeVar("Entry", bound="DataclassInstance")


def write_rows(path: epath.Path, kind: type[Entry], rows: Sequence[Entry]) -> None:
    """Write dataclass instances as csv, one column per field, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {
                name: repr(float(value)) if isinstance(value, float) else value
                for name, value in asdict(row).items()
            }
        )
    write_text(path, text.getvalue())


def read_rows(path: epath.Path, kind: type[Entry]) -> list[Entry]:
    """Read the rows that `write_rows` wrote; none if there is no file. A missing column is read as None.

    Raises UserError for a damaged file.
    """
    if not path.exists():
        return []
    try:
        lines = csv.reader(io.StringIO(path.read_bytes().decode()), strict=True)
        names = next(lines)
        return [_row(kind, dict(zip(names, line, strict=True))) for line in lines if line]
    except (ValueError, StopIteration, csv.Error) as error:
        raise UserError(
            f"{path} is damaged ({first_line(error)}): repair or remove it, and evaluate again"
        ) from error


def _row(kind: type[Entry], texts: Mapping[str, str]) -> Entry:
    values: dict[str, Any] = {}
    for name, column in get_type_hints(kind, include_extras=True).items():
        text = texts.get(name, "")
        if not text and kinds.without_none(column) is column:
            raise ValueError(f"a row has no {name}")
        try:
            values[name] = kinds.read_number(text, column) if text else None
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    return kind(**values)
