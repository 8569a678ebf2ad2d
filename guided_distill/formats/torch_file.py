"""Reads the tensors of a weights file without torch, and without executing a pickle.

It reads three formats: safetensors, and both formats of torch.save, the zip archive and the older stream
of pickles. A pickle is a program for a stack machine, and can call any function. The machine here has
only the instructions that a dictionary of tensors needs. It calls only functions of this module, which
check the types of their arguments, and refuses everything else.
"""

import collections
import io
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from etils import epath

from guided_distill.errors import UserError
from guided_distill.files import regular_file
from guided_distill.formats.safetensors_file import read_safetensors

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_LONGEST_INDEX = 2**20
"""The most bytes of pickles in a file: at most 70 MB of Python objects. A tensor takes about 160."""

_MOST_AXES = 8

_STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


class _Refused(Exception):
    """The file requests something that no tensor needs."""


@dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


@dataclass(frozen=True)
class _Storage:
    """An array of `count` numbers in the file, which `key` identifies."""

    key: str
    dtype: np.dtype
    count: int

    @property
    def size(self) -> int:
        """The storage's length in bytes."""
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class _View:
    """A tensor before its numbers are read: a view of a storage, with strides in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = math.prod(self.shape)
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        if numbers > self.storage.count or (numbers and self.offset + last >= self.storage.count):
            raise _Refused("a tensor that is larger than its storage")

    def array(self, data: bytes) -> np.ndarray:
        """The tensor as a view of the storage's bytes: tensors with a common storage share its memory."""
        itemsize = self.storage.dtype.itemsize
        return np.ndarray(
            self.shape,
            self.storage.dtype,
            buffer=data,
            offset=self.offset * itemsize if math.prod(self.shape) else 0,
            strides=tuple(stride * itemsize for stride in self.strides),
        )


def read_state_dict(path: epath.Path) -> dict[str, np.ndarray]:
    """The tensors, by name, of a safetensors file or of a file that torch.save wrote.

    Reading takes as much memory as the file has numbers. Raises UserError if the file is missing or
    damaged, or holds anything but a dictionary of tensors.
    """
    found = regular_file(path)
    if found is None:
        raise UserError(f"there is no weights file {path}: give the path of one")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        with path.open("rb") as file:
            read = _read_zip if file.read(2) == b"PK" else _read_legacy
            file.seek(0)
            return read(file, found.length)
    except _Refused as error:
        raise UserError(
            f"{path} is not read because it holds more than tensors ({error}): give a file that holds "
            f"only weights, a state_dict"
        ) from None
    except Exception as error:  # Damaged bytes can raise any error in a format's reader.
        raise UserError(
            f"{path} can't be read as a safetensors or torch.save file "
            f"({type(error).__name__}: {str(error)[:200]}): check that the file is complete"
        ) from error


def _read_zip(file: BinaryIO, size: int) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise _Refused("two members of one name")

        def read(name: str, most: int) -> bytes:
            info = members[name]
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise _Refused("a compressed member")
            if info.file_size > min(most, size):
                raise ValueError(f"{name!r:.80} has {info.file_size} bytes")
            return archive.read(info)

        (index,) = (name for name in members if name.endswith("/data.pkl"))
        folder = index.removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in members and read(order, len("little")) != b"little":
            raise ValueError("its numbers are big-endian")
        views = _views(_load(io.BytesIO(read(index, _LONGEST_INDEX))))
        storages = _storages(views.values(), size)
        data = {key: read(f"{folder}data/{key}", each.size) for key, each in storages.items()}
    return {name: view.array(data[view.storage.key]) for name, view in views.items()}


def _read_legacy(file: BinaryIO, size: int) -> dict[str, np.ndarray]:
    head = io.BytesIO(file.read(_LONGEST_INDEX))
    if _load(head) != _LEGACY_MAGIC:
        raise ValueError("torch.save didn't write it")
    _load(head)  # The protocol's version.
    about = _load(head)
    if type(about) is not dict or about.get("little_endian") is not True:
        raise ValueError("its numbers are big-endian")
    views = _views(_load(head))
    storages = _storages(views.values(), size)
    keys = _load(head)
    if type(keys) is not list or any(type(key) is not str for key in keys):
        raise _Refused("a storage whose name is not a string")
    if sorted(keys) != sorted(storages):
        raise ValueError("its storages are not those of its tensors")
    file.seek(head.tell())
    data = {}
    for key in keys:
        if int.from_bytes(file.read(8), "little") != storages[key].count:
            raise ValueError("the length of a storage isn't the one that its tensors give")
        data[key] = file.read(storages[key].size)
    return {name: view.array(data[view.storage.key]) for name, view in views.items()}


def _views(content: Any) -> dict[str, _View]:
    if not isinstance(content, dict):
        raise _Refused(f"a {type(content).__name__} instead of a dictionary")
    for name, value in content.items():
        if not isinstance(value, _View):
            raise _Refused(f"{name!r:.80} is a {type(value).__name__}")
    return dict(content)


def _storages(views: Iterable[_View], size: int) -> dict[str, _Storage]:
    """The storages by key, which together must fit into a file of `size` bytes."""
    storages: dict[str, _Storage] = {}
    for view in views:
        if storages.setdefault(view.storage.key, view.storage) != view.storage:
            raise _Refused("a storage with two types or lengths")
    if sum(each.size for each in storages.values()) > size:
        raise ValueError("its tensors are longer than the file")
    return storages


def _whole_numbers(values: Any) -> bool:
    return all(type(each) is int and 0 <= each < 2**63 for each in values)


def _ordered_dict(*arguments: Any) -> dict[str, Any]:
    if arguments:
        raise _Refused("a dictionary made from arguments")
    return collections.OrderedDict()


def _rebuild_tensor(*arguments: Any) -> _View:
    match arguments:
        case (_Storage() as storage, int(offset), tuple(shape), tuple(strides), *_):
            if len(shape) == len(strides) <= _MOST_AXES and _whole_numbers(
                (offset, *shape, *strides)
            ):
                return _View(storage, offset, shape, strides)
    raise _Refused("a tensor that is not made of a storage, an offset, a shape and strides")


def _rebuild_parameter(*arguments: Any) -> _View:
    match arguments:
        case (_View() as view, *_):
            return view
    raise _Refused("a parameter that is not a tensor")


_ALLOWED: dict[tuple[str, str], Callable[..., Any] | _StorageType] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()},
}


def _global(module: Any, name: Any) -> Any:
    if type(module) is not str or type(name) is not str:
        raise _Refused("a name that is not a string")
    if (module, name) not in _ALLOWED:
        raise _Refused(f"it requests {f'{module}.{name}'!r:.80}")
    return _ALLOWED[module, name]


def _storage(saved_id: Any) -> _Storage:
    match saved_id:
        case ("storage", _StorageType() as kind, str(key), _, int(count), *rest):
            # The older format can name a part of another storage, which torch no longer writes.
            if _whole_numbers([count]) and rest in ([], [None]):
                return _Storage(key, kind.dtype, count)
    raise _Refused("a reference to something that is not a storage")


_CONSTANTS = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
}
_NUMBERS_AND_TEXTS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """A pickle's stack and memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        """Run one instruction, named as in pickletools. Raises _Refused if no tensor needs it."""
        push, pop = self.stack.append, self.stack.pop
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _ if name in _CONSTANTS:
                push(_CONSTANTS[name])
            case _ if name in _NUMBERS_AND_TEXTS:
                push(argument)
            case "EMPTY_DICT":
                push({})
            case "EMPTY_LIST":
                push([])
            case "MARK":
                self.marks.append(len(self.stack))
            case "TUPLE":
                push(tuple(self.since_mark()))
            case _ if name in _TUPLES:
                push(tuple(self.top(_TUPLES[name])))
            case "APPEND":
                self.extend([pop()])
            case "APPENDS":
                self.extend(self.since_mark())
            case "SETITEM":
                self.update(self.top(2))
            case "SETITEMS":
                self.update(self.since_mark())
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "GLOBAL":
                push(_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                push(_global(*self.top(2)))
            case "BINPERSID":
                push(_storage(pop()))
            case "REDUCE":
                self.call(*self.top(2))
            case "BUILD":
                self.build()
            case _:
                raise _Refused(f"it requests {name}")

    def top(self, count: int) -> list[Any]:
        """Pop the last `count` values."""
        if len(self.stack) < count:
            raise ValueError("a pickle takes more than it has")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def since_mark(self) -> list[Any]:
        """Pop the values above the last mark."""
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def extend(self, values: list[Any]) -> None:
        """Append to the list on top of the stack."""
        if type(self.stack[-1]) is not list:
            raise _Refused("values appended to something other than a list")
        self.stack[-1].extend(values)

    def update(self, values: list[Any]) -> None:
        """Set items of the dictionary on top of the stack: keys and values alternate."""
        keys = values[::2]
        if not isinstance(self.stack[-1], dict) or len(values) != 2 * len(keys):
            raise _Refused("an item set in something other than a dictionary")
        for key in keys:
            if type(key) is not str:
                raise _Refused(f"a name that is a {type(key).__name__}")
        self.stack[-1].update(zip(keys, values[1::2], strict=True))

    def call(self, function: Any, arguments: Any) -> None:
        """Call an allowed function and push its result."""
        if not callable(function) or type(arguments) is not tuple:
            raise _Refused("a call of something other than a function")
        self.stack.append(function(*arguments))

    def build(self) -> None:
        """Drop the attributes of an ordered dictionary, in which torch keeps the versions of layers."""
        if type(self.stack[-2]) is not collections.OrderedDict:
            raise _Refused("attributes of something other than an ordered dictionary")
        self.stack.pop()


def _load(stream: BinaryIO) -> Any:
    """The value of the next pickle in a stream."""
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(stream):
        machine.run(opcode.name, argument)
    (value,) = machine.stack
    return value
