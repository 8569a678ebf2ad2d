"""Data as a latent diffusion model sees it, computed once: an autoencoder's latents, encoded captions.

A folder holds `encoding.json`, what was encoded and by what; `null.npy`, the encoded empty prompt; and
for each split `captions.json`, a caption an example, and shards of ArrayRecord: `image-...`, latents and
label of every example, and `text-...`, the states of every distinct caption in sorted order.

Latents are the mean of a KL autoencoder's. A draw would need a random number on every reading, or would
be one draw for good; the mean is neither, and takes half the space of mean and deviation. A mirrored
image has latents of its own, since an autoencoder doesn't commute with mirroring: both are stored, as
two examples one after the other. Numbers are half precision on disk and float32 in batches.
`data/encode.py` writes such folders.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath

from guided_distill.data.source import SPLITS, Examples, Source
from guided_distill.errors import UserError
from guided_distill.files import is_text
from guided_distill.places import local_path_named
from guided_distill.storage import first_line

if TYPE_CHECKING:
    from grain.sources import ArrayRecordDataSource

NUMBERS = np.dtype("<f2")
FORMAT = 1

ABOUT, NULL, CAPTIONS = "encoding.json", "null.npy", "captions.json"
INPAINT = "inpaint"
_AGAIN = "run guided-distill encode again with the arguments it had"


@dataclass(frozen=True)
class Encoding:
    """What a folder holds.

    data: the source's name. image_size: what it was resized to. autoencoder, text_encoder: names and
    fingerprints; text_encoder is None where labels are the condition. shape: of latents [h, w, c].
    text_shape: [L, D], or None. mirrored: whether every training image is there in both orientations.
    sizes: examples of each split, mirrored ones not counted. shard_size: records a file. inpaint:
    whether every record has a mask and the latents of the image without what it hides.
    """

    data: str
    image_size: int | None
    autoencoder: str
    text_encoder: str | None
    shape: tuple[int, ...]
    text_shape: tuple[int, ...] | None
    class_names: tuple[str, ...]
    mirrored: bool
    sizes: Mapping[str, int]
    shard_size: int
    inpaint: bool = False
    format: int = FORMAT

    def copies(self, split: str) -> int:
        """Records of each example of a split."""
        return 2 if self.mirrored and split == "train" else 1

    @property
    def record(self) -> np.dtype:
        """Of an example."""
        fields: list[Any] = [("image", NUMBERS, self.shape), ("label", "<i4")]
        if self.inpaint:
            fields.append((INPAINT, NUMBERS, self.inpaint_shape))
        return np.dtype(fields)

    @property
    def inpaint_shape(self) -> tuple[int, ...]:
        """Of a mask beside the latents that it leaves, [h, w, 1 + c]."""
        height, width, channels = self.shape
        return height, width, 1 + channels


def load_encoded(path: str, *, split: str) -> Source:
    """Opens one split of such a folder.

    Its examples are "image", latents [B, h, w, c], and "text" [B, L, D] or "label" [B]; null is the
    encoded empty prompt. Where it was asked for, "inpaint" [B, h, w, 1 + c] is beside them.

    Raises:
      UserError: there is no such folder, or it isn't finished, or is damaged.
    """
    root = local_path_named(path, "encoded data")
    encoding = read_about(root)
    folder, copies = root / split, encoding.copies(split)
    size = copies * encoding.sizes[split]
    record = encoding.record
    images = _open(folder, "image", record.itemsize, size, encoding.shard_size)
    common: dict[str, Any] = {
        "name": f"encoded:{path}",
        "split": split,
        "shape": encoding.shape,
        "size": size,
        "class_names": encoding.class_names if encoding.text_shape is None else (),
        "latent": True,
    }

    numbers_of = ("image", INPAINT) if encoding.inpaint else ("image",)
    beside = {INPAINT: encoding.inpaint_shape} if encoding.inpaint else {}

    def read_labels(indices: np.ndarray) -> Examples:
        rows = np.frombuffer(b"".join(images.__getitems__(indices.tolist())), record)
        numbers = {name: rows[name].astype(np.float32) for name in numbers_of}
        return {**numbers, "label": rows["label"].astype("i4")}

    if encoding.text_shape is None:
        return Source(read=read_labels, condition_shapes={"label": (), **beside}, **common)

    captions = np.repeat(_read_captions(folder / CAPTIONS, encoding.sizes[split]), copies)
    distinct, text_of = np.unique(captions, return_inverse=True)
    shape = encoding.text_shape
    width = NUMBERS.itemsize * math.prod(shape)
    texts = _open(folder, "text", width, len(distinct), encoding.shard_size)

    def read_texts(indices: np.ndarray) -> Examples:
        numbers, place = np.unique(text_of[indices], return_inverse=True)
        states = np.frombuffer(b"".join(texts.__getitems__(numbers.tolist())), NUMBERS)
        examples = read_labels(indices)
        del examples["label"]
        return {**examples, "text": states.reshape(-1, *shape).astype(np.float32)[place]}

    return Source(
        read=read_texts,
        condition_shapes={"text": shape, **beside},
        null={"text": _read_null(root, shape)},
        captions=captions,
        **common,
    )


class Shard(NamedTuple):
    """A file of the records start to stop."""

    path: epath.Path
    start: int
    stop: int


def shards(folder: epath.Path, kind: str, count: int, size: int) -> list[Shard]:
    """The files of `count` records, `size` in each but the last; kind: "image" or "text"."""
    total = math.ceil(count / size)
    return [
        Shard(
            path=folder / f"{kind}-{index:05}-of-{total:05}.array_record",
            start=index * size,
            stop=min((index + 1) * size, count),
        )
        for index in range(total)
    ]


def _open(
    folder: epath.Path, kind: str, width: int, count: int, size: int
) -> "ArrayRecordDataSource":
    """`count` records of `width` bytes each, `size` in a file."""
    # Takes a while, and of all that a loaded model imports, only this needs it.
    from grain.sources import ArrayRecordDataSource

    paths = []
    for path, start, stop in shards(folder, kind, count, size):
        if not path.exists():
            raise UserError(f"{path} is missing, so the encoding isn't finished: {_AGAIN}")
        try:
            found = len(ArrayRecordDataSource([str(path)]))
        except RuntimeError as error:
            raise UserError(f"{path} is damaged ({error}): remove it and {_AGAIN}") from error
        if found != stop - start:
            raise UserError(
                f"{path} is damaged, it has {found} records in place of {stop - start}: remove it and "
                f"{_AGAIN}"
            )
        paths.append(str(path))
    records = ArrayRecordDataSource(paths)
    if count and len(records[0]) != width:
        raise UserError(
            f"{folder.parent / ABOUT} isn't what it should be (a record of {paths[0]} has "
            f"{len(records[0])} bytes in place of {width}): {_AGAIN}"
        )
    return records


def read_about(root: epath.Path) -> Encoding:
    """What a folder holds. Raises UserError if it is no encoding, or of another format."""
    if not (root / ABOUT).exists():
        raise UserError(
            f"{root} holds no encoded data, {ABOUT} is missing: make it by guided-distill encode"
        )
    values = _read_json(root / ABOUT)
    try:
        if values["format"] != FORMAT or set(values["sizes"]) != set(SPLITS):
            raise ValueError(f"format {values['format']} can't be read")
        for name in ("shape", "text_shape", "class_names"):
            values[name] = None if values[name] is None else tuple(values[name])
        encoding = Encoding(**values)
        _check(encoding)
        return encoding
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{root / ABOUT} isn't what it should be ({first_line(error)}): {_AGAIN}"
        ) from error


def _check(encoding: Encoding) -> None:
    """Raises ValueError for a field that is not what `Encoding` says."""
    numbers = {
        "shape": (encoding.shape, 3),
        "text_shape": ((1, 1) if encoding.text_shape is None else encoding.text_shape, 2),
        "sizes": (encoding.sizes.values(), len(SPLITS)),
        "shard_size": ((encoding.shard_size,), 1),
    }
    for name, (found, count) in numbers.items():
        if len(found) != count or not all(type(each) is int and each > 0 for each in found):
            raise ValueError(f"{name} is {getattr(encoding, name)!r}")
    if (encoding.text_shape is None) != (encoding.text_encoder is None):
        raise ValueError("text_shape and text_encoder must both be there, or neither")
    if not all(map(is_text, encoding.class_names)):
        raise ValueError("class_names must be strings")
    for name in ("mirrored", "inpaint"):
        if not isinstance(getattr(encoding, name), bool):
            raise ValueError(f"{name} is {getattr(encoding, name)!r}")


def _read_captions(path: epath.Path, count: int) -> np.ndarray:
    captions = _read_json(path)
    if not isinstance(captions, list) or len(captions) != count or not all(map(is_text, captions)):
        raise UserError(f"{path} must be a list of {count} strings, one an example: {_AGAIN}")
    return np.array(captions, object)


def _read_json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({first_line(error)}): {_AGAIN}") from error


def _read_null(root: epath.Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        null = np.load(root / NULL)
    except Exception as error:  # Whatever damaged bytes raise in NumPy.
        raise UserError(f"{root / NULL} can't be read ({first_line(error)}): {_AGAIN}") from error
    if null.shape != shape or null.dtype.kind != "f":
        raise UserError(
            f"{root / NULL} is {null.dtype} {list(null.shape)} and must be floats {list(shape)}: {_AGAIN}"
        )
    return null
