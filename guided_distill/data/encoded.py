"""Encoded data: an autoencoder's latents and encoded captions, computed once and read from disk.

A folder holds `encoding.json`, which describes the encoding; `null.npy`, the encoded empty prompt; and
for each split `captions.json`, one caption per example, and ArrayRecord shards. The shards `image-...`
hold the latents and label of every example, and `text-...` the states of every distinct caption, sorted.

The latents of a KL autoencoder are their mean. A draw would need noise on every read, or would be the
same draw in every epoch, and storing mean and variance would take twice the space. Because an
autoencoder doesn't commute with mirroring, a mirror image has its own latents, stored as the next
example. Arrays are half precision on disk and float32 in batches.
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
_AGAIN = "run guided-distill encode again with the same arguments"


@dataclass(frozen=True)
class Encoding:
    """Describes the encoded data in a folder.

    data: the source's name. image_size: the side in pixels that images were resized to. autoencoder,
    text_encoder: fingerprints of the weights; text_encoder is None if the condition is the label. shape:
    the latents' [h, w, c]. text_shape: the states' [L, D], or None. mirrored: whether training images
    are also stored mirrored. sizes: examples per split, not counting mirror images. shard_size: records
    per file. inpaint: whether every record has a mask and the latents of the masked image.
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
        """The number of records per example of a split."""
        return 2 if self.mirrored and split == "train" else 1

    @property
    def record(self) -> np.dtype:
        """The NumPy dtype of one example's record."""
        fields: list[Any] = [("image", NUMBERS, self.shape), ("label", "<i4")]
        if self.inpaint:
            fields.append((INPAINT, NUMBERS, self.inpaint_shape))
        return np.dtype(fields)

    @property
    def inpaint_shape(self) -> tuple[int, ...]:
        """The shape of a mask beside the masked image's latents, [h, w, 1 + c]."""
        height, width, channels = self.shape
        return height, width, 1 + channels


def load_encoded(path: str, *, split: str) -> Source:
    """Opens one split of a folder of encoded data.

    Examples hold "image", the latents [B, h, w, c], "text" [B, L, D] or "label" [B], and, if encoded
    with inpaint, "inpaint" [B, h, w, 1 + c]. The source's null is the encoded empty prompt.

    Raises:
      UserError: the folder is missing, unfinished or damaged.
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

    arrays = ("image", INPAINT) if encoding.inpaint else ("image",)
    inpaint_shapes = {INPAINT: encoding.inpaint_shape} if encoding.inpaint else {}

    def read_labels(indices: np.ndarray) -> Examples:
        rows = np.frombuffer(b"".join(images.__getitems__(indices.tolist())), record)
        examples = {name: rows[name].astype(np.float32) for name in arrays}
        return {**examples, "label": rows["label"].astype("i4")}

    if encoding.text_shape is None:
        return Source(read=read_labels, condition_shapes={"label": (), **inpaint_shapes}, **common)

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
        condition_shapes={"text": shape, **inpaint_shapes},
        null={"text": _read_null(root, shape)},
        captions=captions,
        **common,
    )


class Shard(NamedTuple):
    """The file with the records from start up to, but not including, stop."""

    path: epath.Path
    start: int
    stop: int


def shards(folder: epath.Path, kind: str, count: int, size: int) -> list[Shard]:
    """The files for `count` records, `size` in each but the last. kind: "image" or "text"."""
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
    """Opens `count` records of `width` bytes each, `size` per file."""
    # Imported here, because grain takes a while to load and using a model doesn't need it otherwise.
    from grain.sources import ArrayRecordDataSource

    paths = []
    for path, start, stop in shards(folder, kind, count, size):
        if not path.exists():
            raise UserError(f"{path} is missing, because encoding didn't finish: {_AGAIN}")
        try:
            found = len(ArrayRecordDataSource([str(path)]))
        except RuntimeError as error:
            raise UserError(f"{path} is damaged ({error}): remove it and {_AGAIN}") from error
        if found != stop - start:
            raise UserError(
                f"{path} is damaged ({found} records instead of {stop - start}): remove it and {_AGAIN}"
            )
        paths.append(str(path))
    records = ArrayRecordDataSource(paths)
    if count and len(records[0]) != width:
        raise UserError(
            f"{folder.parent / ABOUT} doesn't describe {paths[0]} (a record has {len(records[0])} bytes "
            f"instead of {width}): {_AGAIN}"
        )
    return records


def read_about(root: epath.Path) -> Encoding:
    """Reads a folder's description. Raises UserError if the folder holds no encoding in this format."""
    if not (root / ABOUT).exists():
        raise UserError(
            f"{root} holds no encoded data ({ABOUT} is missing): make it with guided-distill encode"
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
            f"{root / ABOUT} doesn't describe an encoding ({first_line(error)}): {_AGAIN}"
        ) from error


def _check(encoding: Encoding) -> None:
    """Raises ValueError for a field whose value doesn't fit `Encoding`."""
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
        raise ValueError("text_shape and text_encoder must both be given or both be null")
    if not all(map(is_text, encoding.class_names)):
        raise ValueError("class_names must be strings")
    for name in ("mirrored", "inpaint"):
        if not isinstance(getattr(encoding, name), bool):
            raise ValueError(f"{name} is {getattr(encoding, name)!r}")


def _read_captions(path: epath.Path, count: int) -> np.ndarray:
    captions = _read_json(path)
    if not isinstance(captions, list) or len(captions) != count or not all(map(is_text, captions)):
        raise UserError(f"{path} must be a list of {count} strings, one per example: {_AGAIN}")
    return np.array(captions, object)


def _read_json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({first_line(error)}): {_AGAIN}") from error


def _read_null(root: epath.Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        null = np.load(root / NULL)
    except Exception as error:  # Damaged bytes raise many types of error in NumPy.
        raise UserError(f"{root / NULL} can't be read ({first_line(error)}): {_AGAIN}") from error
    if null.shape != shape or null.dtype.kind != "f":
        raise UserError(
            f"{root / NULL} is {null.dtype} {list(null.shape)} but must be floats {list(shape)}: {_AGAIN}"
        )
    return null
