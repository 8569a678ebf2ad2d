"""Lists the images in large files once, and keeps the list in the user's cache folder.

Random access needs each image's place. Reading a million headers or whole files to find it takes long,
so a list is written once and read again as long as the files have the same names, lengths and times.
Images that have no place of their own, such as those in compressed files, are copied beside the list.
"""

import contextlib
import fcntl
import functools
import io
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from guided_distill.data.contents import shape_in
from guided_distill.data.kept import keep, kept, packed, place_of, unpacked, warn_of_change
from guided_distill.data.rows import Rows, captions_of, labels_of, source_of_rows
from guided_distill.data.source import SPLIT, SPLITS, Source
from guided_distill.errors import UserError
from guided_distill.files import File, regular_file
from guided_distill.places import path_named
from guided_distill.storage import first_line, persistently, storing, whole
from guided_distill.training.progress import progress

log = logging.getLogger(__name__)

_COPIED = -1
_RANGE = re.compile(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}")
_MOST_FILES = 1_000_000


class Place(NamedTuple):
    """Where an image's bytes are: `length` bytes from `start` of the file with this number."""

    file: int
    start: int
    length: int


class Row(NamedTuple):
    """What is kept of a row. shape: its image's [H, W, C]. label: an integer, a string, or None."""

    shape: tuple[int, int, int]
    label: object
    captions: Sequence[str] | None
    place: Place


Copy = Callable[[bytes], Place]
"""Copies an image's bytes beside the list, and returns their place."""

Scan = Callable[[int, File, Copy], Iterable[Row]]
"""f(number of the file, the file, copy) -> its rows."""


def shape_of(content: bytes, *, what: str) -> tuple[int, int, int]:
    """[H, W, C] of an image's bytes. Raises UserError if they are damaged."""
    return shape_in(io.BytesIO(content), what=what)


def load_files(
    path: str,
    rows_in: Callable[[str, Sequence[File]], Rows],
    *,
    kind: str,
    suffixes: Sequence[str],
    split: str,
    image_size: int | None,
) -> Source:
    """The source kind:PATH, whose PATH is a file, a folder of files, or a pattern.

    Rows are numbered in the order of the files' names. The test split is separate files if the path
    contains "{split}", which stands for train and test; otherwise it is a tenth of the rows, the same
    ones as for `npz:`.

    Args:
      rows_in: f(name, files) -> the files' rows, where the name is kind:PATH of a split.
      suffixes: those of the files in a folder.

    Raises:
      UserError: there are no files, or the rows don't fit `source_of_rows`.
    """
    has_splits = SPLIT in path
    here = path.replace(SPLIT, split)
    files = files_named(here, suffixes)
    if not files:
        raise UserError(
            f"no {suffixes[0]} files at {here}: give {kind}:PATH with a file, a folder of them, or a "
            f"pattern such as DIR/*{suffixes[0]}"
        )
    (there,) = (path.replace(SPLIT, each) for each in SPLITS if each != split)
    others = files_named(there, suffixes) if has_splits else []
    return source_of_rows(
        f"{kind}:{path}",
        rows_in(f"{kind}:{here}", files),
        split=split,
        image_size=image_size,
        other=rows_in(f"{kind}:{there}", others) if others else None,
        whole=has_splits,
    )


def files_named(path: str, suffixes: Sequence[str]) -> list[File]:
    """The files at a path, sorted by name: a file, a folder's files with a suffix, or a pattern's.

    A pattern has *, ? or [...] in its last part, or a range such as {000..146}. Raises UserError if a
    file of a range is missing.
    """
    if (numbers := _RANGE.search(path)) is not None:
        return _numbered(path, numbers)
    place = _place(path)
    with storing(place, verb="read"):
        if (file := regular_file(place)) is not None:
            return [file]
        if place.is_dir():
            named = [each for each in place.iterdir() if each.name.endswith(tuple(suffixes))]
        else:
            named = list(place.parent.glob(place.name))
        found = [regular_file(each) for each in sorted(named)]
    return [file for file in found if file is not None]


def _place(path: str) -> epath.Path:
    place = path_named(path)
    return place if place.is_absolute() else place.absolute()


def _numbered(path: str, numbers: re.Match[str]) -> list[File]:
    """The files of a path with a range of numbers, which are as wide as its first one."""
    first, last = int(numbers[1]), int(numbers[2])
    if not 0 <= last - first < _MOST_FILES:
        raise UserError(
            f"{path} names {last - first + 1} files: give a range of 1 to {_MOST_FILES}"
        )
    files = []
    for number in range(first, last + 1):
        name = f"{number:0{len(numbers[1])}}"
        place = _place(path[: numbers.start()] + name + path[numbers.end() :])
        if (file := regular_file(place)) is None:
            raise UserError(f"no file {place}, which {path} names: add it, or change the range")
        files.append(file)
    return files


@contextlib.contextmanager
def reading(file: File, kind: str) -> Iterator[None]:
    """Turns errors of the block, which reads a file of this kind, into UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Damaged bytes raise errors of many types, and so do buckets.
        raise UserError(
            f"{file.path} can't be read as {'an' if kind[0] in 'AEIO' else 'a'} {kind} file "
            f"({first_line(error)}): download or write it again"
        ) from error


def listed(name: str, files: Sequence[File], scan: Scan) -> Rows:
    """The rows of files, listed by `scan` unless the list in the cache is of these very files.

    name: the source's name, which has one list. Raises UserError if the list can't be written, if it is
    damaged, or if rows don't fit `Rows`.
    """
    return _listed(name, tuple(files), scan)


@functools.lru_cache(maxsize=4)
def _listed(name: str, files: tuple[File, ...], scan: Scan) -> Rows:
    stem = place_of("\n".join([name, *(str(file.path) for file in files)]))
    about = [[str(path), length, modified] for path, length, modified in files]
    with _alone(stem):
        arrays = _read(stem, about, name)
        if arrays is None:
            arrays = _write(stem, about, name, files, scan)
        # An open map stays valid if another process replaces the file.
        copied = _copied(stem)
    places, captions = arrays["place"], arrays.get("caption")

    def content(row: int) -> bytes:
        place = Place(*map(int, places[row]))
        if place.file == _COPIED:
            return copied[place.start : place.start + place.length].tobytes()
        return _part(files[place.file].path, place)

    return Rows(
        where=name,
        content=content,
        size=len(places),
        labels=arrays.get("label"),
        captions=None if captions is None else unpacked(captions),
        shapes=arrays["shape"],
    )


@contextlib.contextmanager
def _alone(stem: epath.Path) -> Iterator[None]:
    """Let no other process of this machine list the same data meanwhile."""
    path = stem.with_suffix(".lock")
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    with lock:
        # Some shared disks have no locks. Files are still whole.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(stem: epath.Path, about: object, name: str) -> dict[str, np.ndarray] | None:
    """The arrays of the list, or None if there is none of these files."""
    path = stem.with_suffix(".npz")
    if (found := kept(path)) is None:
        return None
    state, arrays = found
    if state != about:
        warn_of_change(name, path)
        return None
    copies = arrays["place"][arrays["place"][:, 0] == _COPIED]
    if len(copies) and len(_copied(stem)) != copies[:, 1:].sum(axis=1).max():
        log.warning("the copies of %s in %s are incomplete: they are made again", name, stem.parent)
        return None
    return arrays


def _copied(stem: epath.Path) -> np.ndarray:
    path = stem.with_suffix(".images")
    file = regular_file(path)
    return np.memmap(path, np.uint8, "r") if file and file.length else np.zeros(0, np.uint8)


def _write(
    stem: epath.Path, about: object, name: str, files: Sequence[File], scan: Scan
) -> dict[str, np.ndarray]:
    """Lists the files. Returns the arrays of the list."""
    rows: list[Row] = []
    images = stem.with_suffix(".images")
    with contextlib.ExitStack() as written:
        with storing(images):
            stream = written.enter_context(written.enter_context(whole(images)).open("wb"))

        def copy(content: bytes) -> Place:
            with storing(images):
                start = stream.tell()
                stream.write(content)
            return Place(_COPIED, start, len(content))

        with progress(f"listing {name}", total=len(files), unit="files") as advance:
            for number, file in enumerate(files):
                rows += scan(number, file, copy)
                advance(number + 1, f"{len(rows)} images")
        with storing(images):
            written.close()
    if not rows:
        raise UserError(f"{name} has no images: give files that hold some")
    labels = labels_of([row.label for row in rows], where=name)
    captions = captions_of([row.captions for row in rows], where=name)
    arrays: dict[str, np.ndarray] = {
        "shape": np.array([row.shape for row in rows], np.int32),
        "place": np.array([row.place for row in rows], np.int64),
    }
    if labels is not None:
        arrays["label"] = labels
    if captions is not None:
        arrays["caption"] = packed(captions)
    keep(stem.with_suffix(".npz"), about, arrays)
    return arrays


def _part(path: epath.Path, place: Place) -> bytes:
    """The bytes of a place in a file. Raises UserError if the file has become shorter."""

    def read() -> bytes:
        with path.open("rb") as stream:
            stream.seek(place.start)
            return stream.read(place.length)

    content = persistently(read, path, verb="read")
    if len(content) != place.length:
        raise UserError(
            f"{path} has become shorter since it was listed: start again to list it again"
        )
    return content
