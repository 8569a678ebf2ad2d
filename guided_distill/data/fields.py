"""Reads fields of the user's npz files, and checks their sizes before it unpacks them.

A field's header states its size. A field that doesn't fit into memory, or whose compression ratio is
implausible for images, is refused without being unpacked.
"""

import contextlib
import functools
import math
import os
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from etils import epath

from guided_distill.data.contents import array_header
from guided_distill.errors import UserError
from guided_distill.files import regular_file
from guided_distill.storage import first_line

_MEMORY_OF_CONTAINER = Path("/sys/fs/cgroup/memory.max")
_LARGE, _PACKED_AT_MOST = 1 << 30, 500
"""A field of at least _LARGE bytes is refused if it is compressed more than _PACKED_AT_MOST times."""


@dataclass(frozen=True, eq=False)
class Fields:
    """Arrays by name, from the file `path`. names: all fields in the file, whether read or not."""

    path: str
    names: tuple[str, ...]
    arrays: Mapping[str, np.ndarray]

    def find(self, name: str) -> np.ndarray | None:
        """The field with this name or its plural; None if there is no such field."""
        return self.arrays.get(name, self.arrays.get(name + "s"))


def read_fields(path: epath.Path, names: Collection[str]) -> Fields:
    """The fields of an npz file whose names are in `names`; the last result is cached.

    Raises UserError if the file is missing, damaged, encrypted or too large for memory, or if a field
    holds Python objects.
    """
    file = regular_file(path)
    if file is None:
        raise UserError(f"no file {path}: give npz:PATH with the path of an .npz file")
    return _read(*file, frozenset(names))


@functools.lru_cache(maxsize=1)
def _read(path: epath.Path, _length: int, _modified: int, names: frozenset[str]) -> Fields:
    try:
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            wanted = {name: members[name] for name in sorted(names & members.keys())}
            size = sum(_checked_size(archive, name, info) for name, info in wanted.items())
            check_fits(size, str(path))
            arrays = {name: _array(archive, info) for name, info in wanted.items()}
    except UserError:
        raise
    except Exception as error:  # Damaged bytes raise many types of error in zipfile and NumPy.
        raise UserError(
            f"{path} can't be read as an .npz file ({first_line(error)}): save it again"
        ) from error
    return Fields(str(path), tuple(sorted(members)), arrays)


def check_fits(size: int, what: str) -> None:
    """Raises UserError if `size` bytes for `what` exceed the memory of this machine or container."""
    memory = _memory()
    if size > memory:
        raise UserError(
            f"{what} takes {size / 2**30:.1f} GiB of memory, but this machine has {memory / 2**30:.1f} "
            f"GiB: give fewer or smaller images, or folder:PATH, whose files are read one by one"
        )


def _memory() -> int:
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError):  # There is no limit.
        limits.append(int(_MEMORY_OF_CONTAINER.read_text()))
    return min(limits)


def _checked_size(archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo) -> int:
    """The size of a field in bytes. Raises ValueError if its contents don't have the header's size.

    Also if it holds Python objects or its compression ratio is implausible.
    """
    with archive.open(info) as stream:
        shape, dtype = array_header(stream)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects instead of numbers or strings")
        if stream.tell() + size != info.file_size:
            raise ValueError(f"{name} doesn't have the size that its header states")
    if size >= _LARGE and size > _PACKED_AT_MOST * info.compress_size:
        raise ValueError(
            f"{name} unpacks from {info.compress_size} to {size} bytes, which is implausible for images"
        )
    return size


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)
