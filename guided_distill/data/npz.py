"""The source `npz:`, images in one .npz file or one per split, as arrays or as encoded image files."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from guided_distill.data.classes import checked_labels, names_of_classes
from guided_distill.data.fields import Fields, check_fits, read_fields
from guided_distill.data.images import decode_image
from guided_distill.data.pixels import crop_and_resize
from guided_distill.data.source import (
    SPLIT,
    SPLITS,
    TEST_FRACTION,
    Source,
    from_arrays,
    split_indices,
    split_whole_groups,
)
from guided_distill.errors import UserError
from guided_distill.files import is_text, regular_file, warn_once
from guided_distill.places import path_named

_KINDS = ("image", "label", "caption")
_NAMES = frozenset(
    [
        *("jpeg", "offset", "class_names", "group", "groups"),
        *(f"{prefix}{kind}{s}" for prefix in ("", "test_") for kind in _KINDS for s in ("", "s")),
    ]
)


@dataclass(frozen=True, eq=False)
class _Encoded:
    """Image files, concatenated in `content`; that of image i is content[offset[i]:offset[i + 1]]."""

    path: str
    content: np.ndarray
    offset: np.ndarray

    def __len__(self) -> int:
        return len(self.offset) - 1

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, H, W, 3], with the size of the first image."""
        return len(self), *self._pixels(0, None).shape

    def decode(self, rows: np.ndarray, image_size: int | None) -> np.ndarray:
        """The images of `rows`, uint8 [n, H, W, 3].

        Raises UserError if one is damaged or they differ in size or exceed the memory.
        """
        shape = self.shape[1:] if image_size is None else (image_size, image_size, 3)
        check_fits(len(rows) * math.prod(shape), f"{self.path}: `jpeg`, decoded,")
        images = np.empty((len(rows), *shape), np.uint8)
        for place, row in enumerate(rows):
            pixels = self._pixels(row, image_size)
            if pixels.shape != shape:
                raise UserError(
                    f"{self.path}: the images of `jpeg` differ in size: make them one size, or set "
                    f"data.image_size"
                )
            images[place] = pixels
        return images

    def _pixels(self, row: int, image_size: int | None) -> np.ndarray:
        file = self.content[self.offset[row] : self.offset[row + 1]].tobytes()
        image = decode_image(file, what=f"{self.path}: image {row} of `jpeg`")
        return np.asarray(image if image_size is None else crop_and_resize(image, image_size))


@dataclass(frozen=True, eq=False)
class _Examples:
    """images: [N, H, W, C], or encoded. labels: [N]. captions: strings [N], or None."""

    images: np.ndarray | _Encoded
    labels: np.ndarray
    captions: np.ndarray | None


def load_npz(path: str, *, split: str, image_size: int | None) -> Source:
    """Opens an .npz file with the field `image` and optionally `label`; names may be plural.

    Images are uint8, or floats in [-1, 1], with shape [N, H, W, C], C = 1 or 3, or [N, H, W]. Instead
    of `image`, a file can have `jpeg` and `offset`: image i is then the image file
    jpeg[offset[i]:offset[i + 1]], in any format that `data.images` reads. Labels are integers [N] in
    [0, classes.MAX_CLASSES). With image_size, uint8 images are centre-cropped to squares and resized.
    `class_names`, strings [K], and `caption`, strings [N], are optional; strings may be UTF-8 bytes.

    The test split is a separate file if the path contains "{split}", which stands for train and test;
    or the fields `test_image`, `test_label` and `test_caption`; or a tenth of the images, held out by a
    fixed shuffle. With `group`, numbers or strings [N], a tenth of the groups is held out, so that all
    images of a group are in the same split.

    A class without images, and floats that are never negative, cause a warning.

    Raises:
      UserError: the file or a field is missing, doesn't fit this description, or exceeds the memory.
    """
    fields = read_fields(path_named(path.replace(SPLIT, split)), _NAMES)
    in_file = SPLIT not in path and fields.find("test_image") is not None
    train = _examples(fields, prefix="")
    test = _examples(fields, prefix="test_") if in_file else train
    chosen = test if split == "test" else train
    rows = np.arange(len(chosen.labels))
    if in_file:
        _check_one_shape(fields, train, test)
    elif SPLIT not in path:
        rows = _held_out(fields, len(train.labels), split)
    if not len(rows):
        raise UserError(f"{path} has no images for the {split} split: add some")
    others = _labels_of_other_files(path, split)
    class_names = _class_names(fields, [train.labels, test.labels, *others])
    images = chosen.images
    if isinstance(images, _Encoded):
        images = images.decode(rows, image_size)
    elif image_size is not None and images.dtype == np.uint8:
        images = _resized(images, rows, image_size)
    return from_arrays(
        f"npz:{path}",
        split=split,
        images=images,
        labels=chosen.labels[rows],
        class_names=class_names,
        captions=None if chosen.captions is None else chosen.captions[rows],
        # Both splits share the file's array without copying it.
        rows=rows if images is chosen.images else None,
    )


def _check_one_shape(fields: Fields, train: _Examples, test: _Examples) -> None:
    shape, other = train.images.shape[1:], test.images.shape[1:]
    if shape != other:
        raise UserError(
            f"{fields.path}: test_image has images of {other}, but image has {shape}: make them one size"
        )


def _held_out(fields: Fields, count: int, split: str) -> np.ndarray:
    """The indices of one split of a file that holds only one."""
    groups = fields.find("group")
    if groups is None:
        return split_indices(np.zeros(count, int), split=split, test_fraction=TEST_FRACTION)
    if groups.shape != (count,) or groups.dtype.kind not in "iuUS":
        raise UserError(
            f"{fields.path}: group must be integers or strings [{count}]; it is {groups.dtype} "
            f"{list(groups.shape)}"
        )
    return split_whole_groups(groups, split=split, test_fraction=TEST_FRACTION)


def _labels_of_other_files(path: str, split: str) -> list[np.ndarray]:
    """The labels in the file of the other split; none if there is no such file."""
    others = [path_named(path.replace(SPLIT, each)) for each in SPLITS if each != split]
    if SPLIT not in path or regular_file(others[0]) is None:
        return []
    fields = read_fields(others[0], {"label", "labels"})
    labels = fields.find("label")
    return (
        []
        if labels is None
        else [checked_labels(labels, labels.size, where=f"{fields.path}: label")]
    )


def _resized(images: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
    if images.shape[1:3] == (size, size):
        return images[rows]
    squeezed = images[..., 0] if images.shape[-1] == 1 else images
    resized = [np.asarray(crop_and_resize(Image.fromarray(squeezed[row]), size)) for row in rows]
    return np.stack(resized).reshape(len(rows), size, size, -1)


def _examples(fields: Fields, *, prefix: str) -> _Examples:
    """The examples in the fields whose names start with prefix, checked."""
    images = _images(fields, prefix)
    labels = fields.find(prefix + "label")
    if labels is None:
        if prefix and fields.find("label") is not None:
            raise UserError(f"{fields.path} has labels but no `{prefix}label`: add it")
        labels = np.zeros(len(images), np.int32)
    labels = checked_labels(labels, len(images), where=f"{fields.path}: {prefix}label")
    return _Examples(images, labels, _captions(fields, len(images), prefix=prefix))


def _images(fields: Fields, prefix: str) -> np.ndarray | _Encoded:
    name = prefix + "image"
    images = fields.find(name)
    if images is None and not prefix and {"jpeg", "offset"} <= fields.arrays.keys():
        return _encoded(fields)
    if images is None:
        raise UserError(f"{fields.path} has no field `{name}`, only {sorted(fields.names)}: add it")
    if images.ndim == 3:
        images = images[..., None]
    kind = "uint8" if images.dtype == np.uint8 else images.dtype.kind
    if images.ndim != 4 or kind not in ("uint8", "f"):
        raise UserError(
            f"{fields.path}: {name} must be uint8 or float32, [N, H, W, C] or [N, H, W]; it is "
            f"{images.dtype} {list(images.shape)}"
        )
    if images.shape[-1] not in (1, 3):
        turned = images.shape[1] in (1, 3)
        hint = "transpose it by (0, 2, 3, 1)" if turned else "save gray or RGB images"
        raise UserError(
            f"{fields.path}: {name} is {list(images.shape)}, but [N, H, W, C] has 1 or 3 channels: {hint}"
        )
    if kind == "f" and images.size:
        least, most = images.min(), images.max()
        if not (least >= -1 and most <= 1):
            raise UserError(
                f"{fields.path}: {name} is {images.dtype} and must lie in [-1, 1]: rescale it, or save "
                f"uint8"
            )
        if least >= 0:
            warn_once(
                f"{fields.path}: {name} lies in [{least:g}, {most:g}], half of the range [-1, 1]: if its "
                f"range is [0, 1], save 2 * {name} - 1, or uint8"
            )
    return images


def _encoded(fields: Fields) -> _Encoded:
    content, offset = fields.arrays["jpeg"], fields.arrays["offset"]
    if offset.ndim != 1 or len(offset) < 2 or offset.dtype.kind not in "iu":
        raise UserError(
            f"{fields.path}: offset must be integers, one more than there are images; it is "
            f"{offset.dtype} {list(offset.shape)}"
        )
    if content.ndim != 1 or content.dtype != np.uint8:
        raise UserError(
            f"{fields.path}: jpeg must be bytes, uint8 [n]; it is {content.dtype} {list(content.shape)}"
        )
    if offset[0] < 0 or np.any(offset[1:] < offset[:-1]) or offset[-1] > len(content):
        raise UserError(
            f"{fields.path}: offset must rise from 0 to the {len(content)} bytes of jpeg: save both again"
        )
    return _Encoded(fields.path, content, offset.astype(np.int64))


def _captions(fields: Fields, count: int, *, prefix: str) -> np.ndarray | None:
    captions, name = fields.find(prefix + "caption"), prefix + "caption"
    if captions is None and prefix and fields.find("caption") is not None:
        raise UserError(f"{fields.path} has captions but no `{name}`: add it")
    return None if captions is None else _strings(fields, captions, name, shape=(count,))


def _strings(
    fields: Fields, values: np.ndarray, name: str, *, shape: tuple[int, ...] | None = None
) -> np.ndarray:
    """The strings, decoded from bytes if necessary. shape: the required shape, if any."""
    expected = f"[{shape[0]}]" if shape else "[K]"
    if values.ndim != 1 or shape not in (None, values.shape) or values.dtype.kind not in "US":
        raise UserError(
            f"{fields.path}: {name} must be strings {expected}; it is {values.dtype} "
            f"{list(values.shape)}"
        )
    try:
        texts = np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values
    except UnicodeDecodeError as error:
        raise UserError(
            f"{fields.path}: {name} holds bytes that aren't UTF-8: save strings"
        ) from error
    if bad := [str(text) for text in texts if not is_text(text)]:
        raise UserError(
            f"{fields.path}: {name} holds {bad[0]!a}, which can't be encoded in UTF-8: fix it"
        )
    return texts


def _class_names(fields: Fields, labels: Iterable[np.ndarray]) -> list[str]:
    """The name of each class in the labels of all splits."""
    given = fields.arrays.get("class_names")
    names = (
        None if given is None else [str(each) for each in _strings(fields, given, "class_names")]
    )
    return names_of_classes(names, labels, path=fields.path)
