"""The source `webdataset:`, tar files whose members of one name are the parts of a row.

The members 0001.jpg, 0001.cls and 0001.txt are an image, its label and its caption: a name ends at its
first dot, and what follows is the part. An uncompressed tar file has random access to its members.
"""

import gzip
import io
import itertools
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

from guided_distill.data.contents import shape_in
from guided_distill.data.images import SUFFIXES
from guided_distill.data.listing import Copy, Place, Row, listed, load_files, reading
from guided_distill.data.rows import CAPTION, LABEL, Rows, column, texts_in
from guided_distill.data.source import Source
from guided_distill.errors import UserError
from guided_distill.files import File

IMAGES = (*(suffix.removeprefix(".") for suffix in SUFFIXES), "npy")

_GZIP = b"\x1f\x8b"


def load_webdataset(path: str, *, split: str, image_size: int | None) -> Source:
    """Opens tar files of images and, optionally, labels and captions, in the layout of WebDataset.

    A row's image is the first part in IMAGES. Its label is a part in LABEL of `data/rows.py`, an integer
    or a string in a text file; its caption is a part in CAPTION; or both are fields of these names in
    the part "json", where captions may be a list. The images of compressed tar files are copied to the
    cache folder. For the PATH, see `load_files`.

    Raises:
      UserError: there are no files, or they are damaged or don't fit this description; on reading, an
        image is damaged.
    """
    return load_files(
        path,
        _rows_in,
        kind="webdataset",
        suffixes=[".tar", ".tar.gz", ".tgz"],
        split=split,
        image_size=image_size,
    )


def _rows_in(name: str, files: Sequence[File]) -> Rows:
    return listed(name, files, _scan)


class _Part(NamedTuple):
    """A member of a tar file: the name of its row, of the part, and its bytes."""

    row: str
    part: str
    content: IO[bytes]
    start: int
    length: int


def _scan(number: int, file: File, copy: Copy) -> Iterator[Row]:
    with reading(file, "tar"), file.path.open("rb") as stream:
        compressed = stream.read(len(_GZIP)) == _GZIP
        stream.seek(0)
        for name, group in itertools.groupby(_parts(stream, compressed), lambda part: part.row):
            parts = {part.part: part for part in group}
            what = f"{file.path}: {name}"
            kind = column(parts, IMAGES)
            if kind is None:
                raise UserError(
                    f"{what} has no image, only {', '.join(sorted(parts))}: add one, or remove it"
                )
            image = parts[kind]
            shape = shape_in(image.content, what=f"{what}.{kind}")
            place = Place(number, image.start, image.length)
            if compressed:
                image.content.seek(0)
                place = copy(image.content.read())
            fields = _fields(parts, what)
            label, caption = column(fields, LABEL), column(fields, CAPTION)
            yield Row(
                shape,
                fields[label] if label else None,
                texts_in(fields[caption], what=what) if caption else None,
                place,
            )


def _parts(stream: IO[bytes], compressed: bool) -> Iterator[_Part]:
    """The regular files of a tar file, in their order. Raises tarfile.TarError if it is damaged."""
    # tarfile's own reader of compressed streams takes one that is cut off for one that ends.
    whole: Any = gzip.GzipFile(fileobj=stream) if compressed else stream
    with tarfile.open(fileobj=whole, mode="r|" if compressed else "r:") as archive:
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            if not member.isfile() or name.startswith("."):
                continue
            row, _, part = name.partition(".")
            content: Any = archive.extractfile(member)
            if compressed:
                content = io.BytesIO(content.read())
            yield _Part(
                f"{folder}/{row}" if folder else row,
                part.lower(),
                content,
                member.offset_data,
                member.size,
            )
        # tarfile also stops, without an error, where a header is damaged or missing.
        if not compressed:
            stream.seek(archive.offset)
        ended = compressed
        while block := whole.read(tarfile.RECORDSIZE):
            if any(block):
                raise tarfile.ReadError(f"it is damaged at byte {archive.offset}")
            ended = True
        if not ended:
            raise tarfile.ReadError("it ends before its mark of the end")


def _fields(parts: Mapping[str, _Part], what: str) -> dict[str, Any]:
    """The label and captions of a row by the names of their parts, and the fields of its JSON."""
    fields: dict[str, Any] = {}
    if "json" in parts:
        try:
            fields = json.load(parts["json"].content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{what}.json is not JSON: fix it") from error
        if not isinstance(fields, dict):
            raise UserError(f"{what}.json is not a JSON object: fix it")
    for name in (*LABEL, *CAPTION):
        if name in parts:
            fields[name] = _text(parts[name], what, is_label=name in LABEL)
    return fields


def _text(part: _Part, what: str, *, is_label: bool) -> int | str:
    try:
        text = part.content.read().decode().strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{what}.{part.part} isn't UTF-8: save it in UTF-8") from error
    return int(text) if is_label and text.removeprefix("-").isdecimal() else text
