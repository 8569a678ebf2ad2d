"""photo10: 32x32 colour patches of ten photographs that scikit-image and scikit-learn contain.

Nothing is downloaded or redistributed. The set has CIFAR-10's shape and the colour statistics of
photographs, but a class is one photograph: it is a test of textures, not of objects.
"""

import functools
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from guided_distill.data.pixels import from_uint8
from guided_distill.data.source import Examples, Source
from guided_distill.errors import UserError

PATCH = 32
STRIDE = 8
MIN_STD = 8.0
# Widths of the vertical bands, which alternate from left to right in the half-size photograph.
TRAIN_BAND = 128
TEST_BAND = 48

_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}

PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}


def photo10(split: str) -> Source:
    """Opens photo10. Classes alternate: example i is of class i % 10.

    The size is ten times the number of patches of the largest class; smaller classes repeat theirs.

    Raises:
      UserError: one of the packages isn't installed, or lacks a photograph.
    """
    by_class = _patches(split)
    counts = np.array([len(patches) for patches in by_class])
    starts = np.cumsum(counts) - counts
    images = np.concatenate(by_class)

    def read(indices: np.ndarray) -> Examples:
        turn, label = np.divmod(indices, len(counts))
        pixels = from_uint8(images[starts[label] + turn % counts[label]])
        return {"image": pixels, "label": label.astype(np.int32)}

    return Source(
        name="photo10",
        split=split,
        shape=(PATCH, PATCH, 3),
        size=len(counts) * int(counts.max()),
        class_names=tuple(PHOTOS),
        read=read,
    )


def patch_origins(length: int, *, split: str) -> np.ndarray:
    """Left edges of the patches of one split in a photograph `length` pixels wide.

    A patch belongs to a split only if it lies within one of the split's bands, so that the splits share
    no pixel; patches across a border are dropped.
    """
    left = np.arange(0, length - PATCH + 1, STRIDE)
    within = left % (TRAIN_BAND + TEST_BAND)
    if split == "train":
        return left[within + PATCH <= TRAIN_BAND]
    return left[(within >= TRAIN_BAND) & (within + PATCH <= TRAIN_BAND + TEST_BAND)]


@functools.cache
def _patches(split: str) -> list[np.ndarray]:
    return [_cut(_half_size(*place), split=split) for place in PHOTOS.values()]


def _cut(photo: np.ndarray, *, split: str) -> np.ndarray:
    """Cuts uint8 patches [N, 32, 32, 3] of one split out of a photograph [H, W, 3]."""
    top = np.arange(0, len(photo) - PATCH + 1, STRIDE)
    left = patch_origins(photo.shape[1], split=split)
    windows = np.lib.stride_tricks.sliding_window_view(photo, (PATCH, PATCH), axis=(0, 1))
    patches = windows[np.ix_(top, left)].reshape(-1, 3, PATCH, PATCH).transpose(0, 2, 3, 1)
    return patches[patches.std(axis=(1, 2, 3)) >= MIN_STD]


def _half_size(package: str, file: str) -> np.ndarray:
    # find_spec doesn't import the package; skimage.data would offer to download the photograph.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(
            "photo10 needs the photographs in scikit-image and scikit-learn: pip install scikit-image "
            "scikit-learn (the extra `photos`)"
        )
    path = Path(spec.origin).parent / file
    try:
        with Image.open(path) as image:
            photo = image.convert("RGB")
    except OSError as error:
        raise UserError(
            f"photo10 can't read {path}: reinstall {_DISTRIBUTIONS[package]}, which contains it"
        ) from error
    half = photo.resize((photo.width // 2, photo.height // 2), Image.Resampling.LANCZOS)
    return np.asarray(half)
