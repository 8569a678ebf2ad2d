"""Images in .npz files: one with both splits, or one for each; as arrays, or as encoded files."""

import io
import itertools
import zipfile
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from guided_distill.data.pixels import DAMAGED, crop_and_resize
from guided_distill.data.source import Source, from_arrays, split_indices, split_whole_groups
from guided_distill.errors import UserError

SPLIT = "{split}"
TEST_FRACTION = 0.1


class Examples(NamedTuple):
    """images [N, H, W, C], labels [N] and, where there are any, captions [N]."""

    images: np.ndarray
    labels: np.ndarray
    captions: np.ndarray | None

    def at(self, indices: np.ndarray) -> "Examples":
        """Those of some indices."""
        captions = None if self.captions is None else self.captions[indices]
        return Examples(self.images[indices], self.labels[indices], captions)


def load(path: str, *, split: str, image_size: int | None) -> Source:
    """Reads `image` and, where there, `label`; both may also be plural.

    Images are uint8, or float32 already in [-1, 1], [N, H, W, C] or [N, H, W]; or, in place of
    `image`, `jpeg` and `offset`: image i is the file jpeg[offset[i]:offset[i + 1]] of bytes, in any
    format that Pillow reads. Labels are integers [N]. With image_size, uint8 images are
    centre-cropped to squares and resized. `class_names`, strings [K], and `caption`, strings [N], are
    optional.

    The test split is a file of its own where the path holds "{split}", which stands for train and
    test; or `test_image`, `test_label` and `test_caption`; or a tenth of the images, held out by a
    fixed shuffle. With `group`, numbers or strings [N], it is a tenth of the groups: all images of one
    are in the same split.

    Raises:
      UserError: the file or a field of it is missing or not as said.
    """
    fields = _read(path.replace(SPLIT, split))
    own_test = SPLIT in path or _find(fields, "test_image") is not None
    train = _examples(path, fields, prefix="")
    in_file = SPLIT not in path and own_test
    test = _examples(path, fields, prefix="test_") if in_file else train
    chosen = test if split == "test" else train
    if chosen.images.shape[1:] != train.images.shape[1:]:
        raise UserError(
            f"{path}: test_image is {chosen.images.shape[1:]} an image and image is "
            f"{train.images.shape[1:]}; make them one size"
        )
    if not own_test:
        chosen = train.at(_held_out(path, fields, len(train.images), split))
    images = chosen.images
    if not len(images):
        raise UserError(f"{path} has no images for the {split} split: add some")
    if image_size is not None and images.dtype == np.uint8:
        images = _resize(images, image_size)
    num_classes = int(max(train.labels.max(initial=0), test.labels.max(initial=0))) + 1
    return from_arrays(
        f"npz:{path}",
        split=split,
        images=images,
        labels=chosen.labels,
        class_names=_class_names(path, fields, num_classes),
        captions=chosen.captions,
    )


def _held_out(path: str, fields: Mapping[str, np.ndarray], count: int, split: str) -> np.ndarray:
    """Indices of one split of a file that doesn't have two."""
    groups = _find(fields, "group")
    if groups is None:
        return split_indices(np.zeros(count, int), split=split, test_fraction=TEST_FRACTION)
    if groups.shape != (count,) or groups.dtype.kind not in "iuU":
        raise UserError(
            f"{path}: group must be integers or strings [{count}]; it is {groups.dtype} "
            f"{list(groups.shape)}"
        )
    return split_whole_groups(groups, split=split, test_fraction=TEST_FRACTION)


def _read(path: str) -> dict[str, np.ndarray]:
    try:
        with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return dict(archive)
    except FileNotFoundError as error:
        raise UserError(f"no file {path}: give npz: the path of an .npz file") from error
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an .npz file: {error}") from error


def _decode(path: str, files: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Images [N, H, W, 3] of encoded files that lie end to end in the bytes `files`."""
    if len(offset) < 2 or offset.dtype.kind not in "iu":
        raise UserError(
            f"{path}: offset must be integers, one more than there are images; it is "
            f"{offset.dtype} {list(offset.shape)}"
        )
    images = []
    for index, (start, end) in enumerate(itertools.pairwise(offset)):
        try:
            with Image.open(io.BytesIO(files[start:end].tobytes())) as image:
                images.append(np.asarray(image.convert("RGB")))
        except DAMAGED as error:
            raise UserError(f"{path}: image {index} of `jpeg` cannot be read: {error}") from error
    if len({image.shape for image in images}) > 1:
        raise UserError(f"{path}: the images of `jpeg` differ in size; make them one size")
    return np.stack(images)


def _resize(images: np.ndarray, size: int) -> np.ndarray:
    if images.shape[1:3] == (size, size):
        return images
    squeezed = images[..., 0] if images.shape[-1] == 1 else images
    resized = [np.asarray(crop_and_resize(Image.fromarray(each), size)) for each in squeezed]
    return np.stack(resized).reshape(len(images), size, size, -1)


def _find(fields: Mapping[str, np.ndarray], name: str) -> np.ndarray | None:
    return fields.get(name, fields.get(name + "s"))


def _examples(path: str, fields: Mapping[str, np.ndarray], *, prefix: str) -> Examples:
    """What the fields hold whose names start with prefix, checked."""
    images = _find(fields, prefix + "image")
    if images is None and not prefix and {"jpeg", "offset"} <= fields.keys():
        images = _decode(path, fields["jpeg"], fields["offset"])
    if images is None:
        raise UserError(f"{path} has no field `image`, only {sorted(fields)}: add it")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.dtype not in (np.uint8, np.float32):
        raise UserError(
            f"{path}: {prefix}image must be uint8 or float32, [N, H, W, C] or [N, H, W]; it is "
            f"{images.dtype} {list(images.shape)}"
        )
    if images.dtype == np.float32 and not np.all(np.abs(images) <= 1):
        raise UserError(
            f"{path}: {prefix}image is float32 and must lie in [-1, 1]: rescale it, or save uint8"
        )
    labels = _find(fields, prefix + "label")
    if labels is None:
        if prefix and _find(fields, "label") is not None:
            raise UserError(f"{path} has labels but no `{prefix}label`: add it")
        labels = np.zeros(len(images), np.int32)
    if (
        labels.shape != images.shape[:1]
        or labels.dtype.kind not in "iu"
        or labels.min(initial=0) < 0
    ):
        raise UserError(
            f"{path}: {prefix}label must be non-negative integers [{len(images)}]; it is "
            f"{labels.dtype} {list(labels.shape)}"
        )
    return Examples(images, labels, _captions(path, fields, len(images), prefix=prefix))


def _captions(
    path: str, fields: Mapping[str, np.ndarray], count: int, *, prefix: str
) -> np.ndarray | None:
    captions = _find(fields, prefix + "caption")
    if captions is None and prefix and _find(fields, "caption") is not None:
        raise UserError(f"{path} has captions but no `{prefix}caption`: add it")
    if captions is not None and (captions.shape != (count,) or captions.dtype.kind != "U"):
        raise UserError(
            f"{path}: {prefix}caption must be strings [{count}]; it is {captions.dtype} "
            f"{list(captions.shape)}"
        )
    return captions


def _class_names(path: str, fields: Mapping[str, np.ndarray], num_classes: int) -> list[str]:
    names = fields.get("class_names")
    if names is None:
        return [str(label) for label in range(num_classes)]
    if len(names) < num_classes:
        raise UserError(
            f"{path}: class_names has {len(names)} names, but labels go up to {num_classes - 1}: "
            "name every class"
        )
    return [str(name) for name in names]
