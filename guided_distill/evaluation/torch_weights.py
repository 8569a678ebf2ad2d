"""Tensors of a weights file, read without torch and without running what a pickle asks for.

Three formats: safetensors, and both of torch.save, the zip archive and the older stream of pickles.
A checkpoint of torch is a pickle, which could call any function on being read; the reader here knows
the handful of names that tensors need and refuses every other.
"""

import collections
import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from guided_distill.errors import UserError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


class _Refused(Exception):
    """The file asks for something that no tensor needs."""


@dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


@dataclass(frozen=True)
class _Storage:
    """A run of numbers in the file; `key` says which."""

    key: str
    dtype: np.dtype


@dataclass(frozen=True)
class _View:
    """A tensor before its numbers are at hand: a window on a storage, strides in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, data: bytes) -> np.ndarray:
        itemsize = self.storage.dtype.itemsize
        if self.offset < 0:
            raise ValueError("a tensor begins before its storage")
        # NumPy checks that no element lies outside of the data.
        window: np.ndarray = np.ndarray(
            self.shape,
            self.storage.dtype,
            buffer=data,
            offset=self.offset * itemsize,
            strides=tuple(stride * itemsize for stride in self.strides),
        )
        return np.ascontiguousarray(window).reshape(self.shape)


def read_tensors(path: epath.Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, or of a file that torch.save wrote, by name.

    Raises UserError if the file is missing, damaged, or holds anything but a dictionary of tensors.
    """
    if not path.is_file():
        raise UserError(f"there is no weights file {path}: give the path of one")
    data = path.read_bytes()
    try:
        if path.suffix == ".safetensors":
            return safetensors.numpy.load(data)
        if data.startswith(b"PK"):
            return _read_zip(data)
        return _read_legacy(data)
    except _Refused as error:
        raise UserError(
            f"{path} is not read, for it holds more than tensors ({error}): give a file of weights "
            f"alone, a state_dict"
        ) from None
    except Exception as error:  # Whatever damaged bytes raise in a format's reader.
        raise UserError(
            f"{path} can't be read as weights, of safetensors or torch.save "
            f"({type(error).__name__}: {str(error)[:200]}): is the file whole?"
        ) from error


def _read_zip(data: bytes) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        (index,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = index.removesuffix("data.pkl")
        views = _views(_Unpickler(io.BytesIO(archive.read(index))).load())
        return {
            name: view.array(archive.read(f"{folder}data/{view.storage.key}"))
            for name, view in views.items()
        }


def _read_legacy(data: bytes) -> dict[str, np.ndarray]:
    stream = io.BytesIO(data)

    def load() -> Any:
        return _Unpickler(stream).load()

    if load() != _LEGACY_MAGIC:
        raise ValueError("not a file of torch.save")
    load()  # The protocol's version.
    load()  # The writer's byte order and word sizes.
    views = _views(load())
    dtypes = {view.storage.key: view.storage.dtype for view in views.values()}
    storages = {}
    for key in load():
        count = int.from_bytes(stream.read(8), "little")
        storages[key] = stream.read(count * dtypes[key].itemsize)
    return {name: view.array(storages[view.storage.key]) for name, view in views.items()}


def _views(content: Any) -> dict[str, _View]:
    if not isinstance(content, Mapping):
        raise _Refused(f"a {type(content).__name__} in place of a dictionary")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, _View):
            raise _Refused(f"{name!r} is a {type(value).__name__}")
    return dict(content)


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> _View:
    return _View(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(view: _View, *_: Any) -> _View:
    return view


_ALLOWED: dict[tuple[str, str], Callable[..., Any] | _StorageType] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _Refused(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, saved_id: Any) -> _Storage:
        match saved_id:
            case ("storage", _StorageType() as kind, str() as key, *_):
                return _Storage(key, kind.dtype)
        raise _Refused("a reference to something that is not a storage")
