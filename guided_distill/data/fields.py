"""Fields of npz files that a user gives: checked for size before anything is unpacked.

A field's own header says how large it is. A field that this machine couldn't hold, or that is packed as
no data are, is refused by what the headers say.
"""

import contextlib
import functools
import math
import os
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from etils import epath

from guided_distill.errors import UserError
from guided_distill.files import regular_file
from guided_distill.storage import first_line

_MEMORY_OF_CONTAINER = Path("/sys/fs/cgroup/memory.max")
_LARGE, _PACKED_AT_MOST = 1 << 30, 500
"""Fields of this many bytes aren't packed tighter than this: it takes a gigabyte of zeros."""


@dataclass(frozen=True, eq=False)
class Fields:
    """Arrays by name, of the file at `path`; names: of all fields that it has, read or not."""

    path: str
    names: tuple[str, ...]
    arrays: Mapping[str, np.ndarray]

    def find(self, name: str) -> np.ndarray | None:
        """The field, whose name may be plural, too; None if there is none."""
        return self.arrays.get(name, self.arrays.get(name + "s"))


def read_fields(path: epath.Path, names: Collection[str]) -> Fields:
    """The fields of an npz file that are among `names`; what was read last is kept, and not read again.

    Raises UserError if there is no such file, or it is damaged, encrypted or too large, or if a field
    holds Python objects.
    """
    file = regular_file(path)
    if file is None:
        raise UserError(f"no file {path}: give npz: the path of an .npz file")
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
    except Exception as error:  # Whatever damaged bytes raise in zipfile and NumPy.
        raise UserError(f"{path} cannot be read as an .npz file: {first_line(error)}") from error
    return Fields(str(path), tuple(sorted(members)), arrays)


def check_fits(size: int, what: str) -> None:
    """Raises UserError if `what` takes more bytes than this machine, or its container, has."""
    memory = _memory()
    if size > memory:
        raise UserError(
            f"{what} takes {size / 2**30:.1f} GiB of memory, and there are {memory / 2**30:.1f}: give "
            f"fewer or smaller images, or a folder: of files, which are read one by one"
        )


def _memory() -> int:
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError):  # There is none, or it is "max".
        limits.append(int(_MEMORY_OF_CONTAINER.read_text()))
    return min(limits)


def _checked_size(archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo) -> int:
    """Bytes of a field. Raises ValueError unless it is as long as its header says."""
    with archive.open(info) as stream:
        dtype, size = _header(stream)
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, save numbers or strings")
        if stream.tell() + size != info.file_size:
            raise ValueError(f"{name} isn't as long as its header says")
    if size >= _LARGE and size > _PACKED_AT_MOST * info.compress_size:
        raise ValueError(
            f"{name} is {info.compress_size} bytes that unpack to {size}, as no images do"
        )
    return size


def _header(stream: IO[bytes]) -> tuple[np.dtype, int]:
    """The type of an array and its size in bytes."""
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, _, dtype = read[version](stream)
    return dtype, math.prod(shape) * dtype.itemsize


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)
