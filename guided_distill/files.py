"""What all readers of the user's files share: regular files and texts."""

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
    """A regular file as it is now: its length in bytes, and when it was modified."""

    path: epath.Path
    length: int
    modified: int


def regular_file(path: epath.Path) -> File | None:
    """The file, or None where there is none, or a folder, a pipe or a device, which may never end."""
    try:
        if "://" in str(path):
            far = path.stat()
            return None if far.is_directory else File(path, far.length, int(far.mtime))
        # Not epath's stat, which looks up the owner's name and fails where there is none.
        here = os.stat(path)
    except OSError:
        return None
    return File(path, here.st_size, here.st_mtime_ns) if stat.S_ISREG(here.st_mode) else None


def read_text(path: epath.Path, *, what: str = "") -> str:
    """The text of a file in UTF-8, without a byte order mark. Raises UserError.

    what: how the error begins, such as with a flag.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{what}{path} can't be read as text, save it in UTF-8: {first_line(error)}"
        ) from error


def is_text(text: object) -> bool:
    """Whether it is a string that can be encoded, without half of a surrogate pair."""
    if not isinstance(text, str):
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@functools.cache
def warn_once(sentence: str) -> None:
    """Log a warning, though both splits of a source find what it says."""
    log.warning("%s", sentence)
