"""Converts between 8-bit images and the model's range [-1, 1], and resizes images."""

from collections.abc import Sequence

import numpy as np
from PIL import Image


def from_uint8(images: np.ndarray) -> np.ndarray:
    """Maps 0..255 to float32 in [-1, 1]: u / 127.5 - 1."""
    values = images.astype(np.float32)
    values /= 127.5
    values -= 1
    return values


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Maps [-1, 1] to 0..255: clip, then round (x + 1) * 127.5 half to even.

    It inverts `from_uint8` exactly for all 256 values; values outside [-1, 1] saturate.
    """
    clipped = np.clip(np.asarray(images, np.float32), -1, 1)
    return np.rint((clipped + 1) * 127.5).astype(np.uint8)


def crop_and_resize(image: Image.Image, image_size: int) -> Image.Image:
    """Cuts the largest centred square, then resizes it with a Lanczos filter."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((image_size, image_size), Image.Resampling.LANCZOS)


def fitted(image: Image.Image, shape: Sequence[int]) -> np.ndarray:
    """The pixels, uint8 [*shape], of an RGB image, centre-cropped to a square and resized.

    shape: (size, size, 1 or 3).
    """
    image = crop_and_resize(image, shape[0])
    return np.asarray(image.convert("L") if shape[-1] == 1 else image).reshape(shape)
