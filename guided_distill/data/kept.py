"""Arrays in the user's cache folder that describe some files, used as long as the files don't change."""

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from guided_distill.places import cache_folder
from guided_distill.storage import npz_bytes, read_npz, storing, whole

log = logging.getLogger(__name__)

_FORMAT = 1
_ABOUT = "about"


def place_of(name: str) -> epath.Path:
    """The path in the cache folder, without a suffix, of what is kept under a name of any length."""
    return cache_folder() / "data" / hashlib.sha256(name.encode()).hexdigest()[:20]


def kept(path: epath.Path) -> tuple[Any, dict[str, np.ndarray]] | None:
    """What `keep` has kept at the path, if anything. Raises UserError if it is damaged."""
    if not path.exists():
        return None
    arrays = read_npz(path)
    version, about = unpacked(arrays.pop(_ABOUT))
    return (about, arrays) if version == _FORMAT else None


def keep(path: epath.Path, about: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Keeps arrays, with a JSON value that identifies the state of the files that they describe.

    Raises UserError if they can't be written.
    """
    content = npz_bytes(**{_ABOUT: packed([_FORMAT, about])}, **arrays)
    with storing(path), whole(path) as part:
        part.write_bytes(content)


def warn_of_change(what: str, path: epath.Path) -> None:
    """Logs that the files have changed since their list was kept at the path."""
    log.warning("%s has changed since it was listed in %s: it is listed again", what, path)


def packed(value: Any) -> np.ndarray:
    """A JSON value as an array of bytes."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def unpacked(array: np.ndarray) -> Any:
    """The value of `packed`."""
    return json.loads(array.tobytes())
