"""Reads the tensors of a safetensors file, with every dtype of ml_dtypes, from any storage.

The format: the header's length in 8 bytes; the header, a JSON object that gives the dtype, shape and
place of each tensor; and the numbers (github.com/huggingface/safetensors). The library of that name
returns no float8 arrays and reads only local files.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from etils import epath

from guided_distill.errors import UserError

_LONGEST_HEADER = 2**22
"""The most bytes in a header: at most 100 MB of Python objects. A tensor takes about 100."""

_DTYPES = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
}

_FLOATS = {dtype for name, dtype in _DTYPES.items() if name.startswith(("F", "BF"))}
_MOST_AXES = 32


@dataclass(frozen=True)
class _Place:
    """A tensor's place in the file: `start` and `end` in bytes after the header."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_safetensors(
    path: epath.Path, wanted: Callable[[str], bool] = bool
) -> dict[str, np.ndarray]:
    """The tensors, by name, of a safetensors file whose names are `wanted`; by default all.

    Reading takes the memory of those tensors and of the header. Raises UserError if the file is missing
    or damaged, or has a dtype that neither NumPy nor ml_dtypes has.
    """
    with _opened(path) as (file, size):
        places = _places(_header(file, size), size - file.tell())
        begin = file.tell()
        return {name: _read(file, begin, place) for name, place in places.items() if wanted(name)}


def read_metadata(path: epath.Path) -> dict[str, Any]:
    """The metadata of a safetensors file. Raises UserError if the file is missing or damaged."""
    with _opened(path) as (file, size):
        metadata = _header(file, size).get("__metadata__", {})
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is not an object")
        return metadata


def read_dtypes(path: epath.Path) -> set[np.dtype]:
    """The dtypes of a safetensors file's tensors. Raises UserError if it is missing or damaged."""
    with _opened(path) as (file, size):
        places = _places(_header(file, size), size - file.tell())
        return {place.dtype for place in places.values()}


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[tuple[BinaryIO, int]]:
    """Yields the file and its length in bytes. Raises UserError if the block fails to read it."""
    try:
        with path.open("rb") as file:
            yield file, path.stat().length
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} can't be read as safetensors ({str(error)[:200]}): check that the file is complete"
        ) from error


def is_floating(dtype: np.dtype) -> bool:
    """Whether the dtype is one that weights are stored in, from float8 to float64."""
    return dtype in _FLOATS


def _header(file: BinaryIO, size: int) -> dict[str, Any]:
    """The header, read from the start of `file`."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(size - 8, _LONGEST_HEADER):
        raise ValueError(f"its header is {length} bytes long, in a file of {size}")
    header = json.loads(file.read(length), object_pairs_hook=_without_repeats)
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    return header


def _places(header: dict[str, Any], size: int) -> dict[str, _Place]:
    """The places of all tensors, which must fill `size` bytes without a gap."""
    places = {name: _place(name, at) for name, at in header.items() if name != "__metadata__"}
    end = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].end)):
        if place.start != end:
            raise ValueError(f"{name!r:.80} doesn't begin where the tensor before it ends")
        end = place.end
    if end != size:
        raise ValueError(f"its tensors take {end} bytes, in a file that has {size}")
    return places


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("its header has a name twice")
    return values


def _place(name: str, at: Any) -> _Place:
    match at:
        case {"dtype": str(kind), "shape": [*shape], "data_offsets": [start, end]}:
            pass
        case _:
            raise ValueError(f"its header has no place for {name!r:.80}")
    if kind not in _DTYPES:
        raise ValueError(f"{name!r:.80} has the unknown dtype {kind!r:.20}")
    numbers = (*shape, start, end)
    if len(shape) > _MOST_AXES or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
        raise ValueError(f"its header has no place for {name!r:.80}")
    if math.prod(shape) * _DTYPES[kind].itemsize != end - start:
        raise ValueError(f"{name!r:.80} doesn't have the length of its shape")
    return _Place(_DTYPES[kind], tuple(shape), start, end)


def _read(file: BinaryIO, begin: int, place: _Place) -> np.ndarray:
    file.seek(begin + place.start)
    numbers = file.read(place.end - place.start)
    if len(numbers) != place.end - place.start:
        raise ValueError("it ends early")
    return np.frombuffer(numbers, place.dtype).reshape(place.shape)
