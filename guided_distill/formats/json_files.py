"""JSON files that others wrote, read with a sentence for every way in which they can be wrong."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from guided_distill.errors import UserError
from guided_distill.storage import write_text


def read_text(path: epath.Path) -> str:
    """A text file's content. Raises UserError if it is missing or can't be read as UTF-8."""
    try:
        return path.read_text()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: give the whole folder of the model") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {error}") from error


def read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON file's object. Raises UserError if the file is missing or holds anything else."""
    try:
        values = json.loads(read_text(path))
    # A file nested deeper than any real one runs into the parser's limit.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): is the file whole?") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, and should hold an object")
    return values


def write_json(path: epath.Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file as diffusers writes its own."""
    write_text(path, json.dumps(values, indent=2) + "\n")
