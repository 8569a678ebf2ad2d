"""JSON files of other programs: reads them, and checks the values of their keys.

The checks raise UserError, naming the file `where` and the key.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from etils import epath

from guided_distill.errors import UserError
from guided_distill.storage import write_text


def read_model_text(path: epath.Path) -> str:
    """The content of a model's text file. Raises UserError if it is missing or isn't UTF-8."""
    try:
        return path.read_text()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: give the model's complete folder") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} can't be read ({error}): check that the file is complete"
        ) from error


def read_json(path: epath.Path) -> dict[str, Any]:
    """The object of a JSON file. Raises UserError if the file is missing or holds anything else."""
    try:
        values = json.loads(read_model_text(path))
    # A file that is nested too deeply exceeds the parser's recursion limit.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): check that the file is complete") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, and should hold an object")
    return values


def write_json(path: epath.Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file in the format of diffusers' own."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def must(value: Any, only: Any, key: str, where: object) -> None:
    """Raises UserError unless the value is `only`, the one that is supported."""
    if value != only:
        raise UserError(f"{where}: {key} is {value!r}, and only {only!r} is supported")


def one_of(value: Any, choices: Collection[str], key: str, where: object) -> None:
    """Raises UserError unless the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{where}: {key} is {value!r}; supported are {', '.join(choices)}")


def positive(value: Any, key: str, where: object) -> float:
    """The value as a float. Raises UserError unless it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{where}: {key} is {value!r}, and must be a number above 0")
    return float(value)


def whole_number(value: Any, key: str, where: object) -> int:
    """The value. Raises UserError unless it is a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: {key} is {value!r}, and must be a whole number above 0")
    return value


def whole_numbers(values: Any, key: str, where: object) -> tuple[int, ...]:
    """The values. Raises UserError unless they are a list of whole numbers above 0."""
    return tuple(whole_number(value, key, where) for value in a_list(values, key, where))


def a_list(values: Any, key: str, where: object) -> Sequence[Any]:
    """The values. Raises UserError unless they are a list with at least one entry."""
    if not isinstance(values, list | tuple) or not values:
        raise UserError(f"{where}: {key} is {values!r}, and must be a list of at least one entry")
    return values


def an_object(value: Any, key: str, where: object) -> Mapping[str, Any]:
    """The value, or an empty object for null. Raises UserError for anything else."""
    if not isinstance(value, dict | None):
        raise UserError(f"{where}: {key} is {value!r:.80}, and must be an object")
    return value or {}


def divides(parts: int, whole: int, key: str, of: str, where: object) -> None:
    """Raises UserError unless `parts`, the value of `key`, divides `whole`, the value of the key `of`."""
    if whole % parts:
        raise UserError(f"{where}: {key} is {parts}, which doesn't divide {of}, {whole}")
