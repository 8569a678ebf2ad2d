"""Images in one .npz file."""

import zipfile
from collections.abc import Mapping

import numpy as np
from etils import epath

from guided_distill.data.source import Source, from_arrays, split_indices
from guided_distill.errors import UserError


def load(path: str, *, split: str) -> Source:
    """Reads `image` and, where there, `label`; both may also be plural.

    Images are uint8, or float32 already in [-1, 1], [N, H, W, C] or [N, H, W]; labels are integers
    [N]. `test_image` and `test_label` are the test split; without them a tenth is held out by a
    fixed shuffle. `class_names`, strings [K], is optional too.

    Raises:
      UserError: the file or a field of it is missing or not as said.
    """
    fields = _read(path)
    train = _examples(path, fields, prefix="")
    has_own_test = _find(fields, "test_image") is not None
    test = _examples(path, fields, prefix="test_") if has_own_test else train
    images, labels = test if split == "test" else train
    if images.shape[1:] != train[0].shape[1:]:
        raise UserError(
            f"{path}: test_image is {images.shape[1:]} an image and image is "
            f"{train[0].shape[1:]}; make them one size"
        )
    if not has_own_test:
        indices = split_indices(np.zeros(len(images), int), split=split, test_fraction=0.1)
        images, labels = images[indices], labels[indices]
    if not len(images):
        raise UserError(f"{path} has no images for the {split} split: add some")
    num_classes = int(max(train[1].max(initial=0), test[1].max(initial=0))) + 1
    return from_arrays(
        f"npz:{path}",
        split=split,
        images=images,
        labels=labels,
        class_names=_class_names(path, fields, num_classes),
    )


def _read(path: str) -> dict[str, np.ndarray]:
    try:
        with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return dict(archive)
    except FileNotFoundError as error:
        raise UserError(f"no file {path}: give npz: the path of an .npz file") from error
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an .npz file: {error}") from error


def _find(fields: Mapping[str, np.ndarray], name: str) -> np.ndarray | None:
    return fields.get(name, fields.get(name + "s"))


def _examples(
    path: str, fields: Mapping[str, np.ndarray], *, prefix: str
) -> tuple[np.ndarray, np.ndarray]:
    """Checked images [N, H, W, C] and labels [N] of the fields whose names start with prefix."""
    images = _find(fields, prefix + "image")
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
    return images, labels


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
