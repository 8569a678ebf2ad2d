"""Functions that all readers of the user's files share: regular files, texts and warnings."""

import functools
import logging
import os
import stat
from typing import NamedTuple

from etils import epath

from guided_distill.errors import UserError
from guided_distill.storage import first_line

log = logging.getLogger(__name__)


class File(NamedTuple):
    """A regular file, its length in bytes, and its modification time."""

    path: epath.Path
    length: int
    modified: int


def regular_file(path: epath.Path) -> File | None:
    """Return the file, or None if it is missing, a folder, or a pipe or device, which may never end."""
    try:
        if "://" in str(path):
            far = path.stat()
            return None if far.is_directory else File(path, far.length, int(far.mtime))
        # epath's stat looks up the owner's name and fails if the owner has none.
        here = os.stat(path)
    except OSError:
        return None
    return File(path, here.st_size, here.st_mtime_ns) if stat.S_ISREG(here.st_mode) else None


def read_text(path: epath.Path, *, what: str = "") -> str:
    """Return the text of a UTF-8 file, without a byte order mark. Raises UserError if it can't be read.

    what: a prefix for the error's message, such as a flag and a space.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{what}{path} can't be read as text ({first_line(error)}): save it in UTF-8"
        ) from error


def is_text(text: object) -> bool:
    """Whether the object is a string that can be encoded, so without lone surrogates."""
    if not isinstance(text, str):
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@functools.cache
def warn_once(sentence: str) -> None:
    """Log a warning once, even if both splits of a source cause it."""
    log.warning("%s", sentence)
