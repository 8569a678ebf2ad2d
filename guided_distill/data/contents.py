"""One image as bytes: an image file, or an array in NumPy's format .npy.

Arrays are uint8, or floats in [-1, 1], with shape [H, W, C], C = 1 or 3, or [H, W]. Image files are RGB.
"""

import contextlib
import io
import math
from collections.abc import Iterator
from typing import IO

import numpy as np
from PIL import Image

from guided_distill.data.images import decode_image, upright_size_in
from guided_distill.data.pixels import crop_and_resize
from guided_distill.errors import UserError
from guided_distill.storage import first_line

_NPY = np.lib.format.MAGIC_PREFIX


def array_bytes(array: np.ndarray) -> bytes:
    """The content of a .npy file that holds the array."""
    content = io.BytesIO()
    np.lib.format.write_array(content, array, allow_pickle=False)
    return content.getvalue()


def array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and dtype in the header of a .npy file. Raises what NumPy raises for damaged ones."""
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, _, dtype = read[version](stream)
    return shape, dtype


def shape_in(stream: IO[bytes], *, what: str) -> tuple[int, int, int]:
    """(height, width, channels) of the image in a file, from its header.

    what: the image's name in errors. Raises UserError if the header is damaged or isn't an image's.
    """
    is_array = stream.read(len(_NPY)) == _NPY
    stream.seek(0)
    if not is_array:
        width, height = upright_size_in(stream, what=what)
        return height, width, 3
    with _reading_array(what):
        return _checked_shape(*array_header(stream))


def pixels_in(content: bytes, *, what: str, image_size: int | None) -> np.ndarray:
    """The image: uint8 or float32 [H, W, C].

    With image_size, uint8 images are centre-cropped to squares and resized. what: the image's name in
    errors. Raises UserError if the image is damaged.
    """
    if not content.startswith(_NPY):
        image = decode_image(content, what=what)
        return np.asarray(image if image_size is None else crop_and_resize(image, image_size))
    with _reading_array(what):
        array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
        array = array.reshape(_checked_shape(array.shape, array.dtype))
        if array.dtype != np.uint8:
            if not (array.min() >= -1 and array.max() <= 1):
                raise ValueError("its floats must lie in [-1, 1]")
            return array.astype(np.float32)
    if image_size is None or array.shape[:2] == (image_size, image_size):
        return array
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    return np.asarray(crop_and_resize(image, image_size)).reshape(image_size, image_size, -1)


def _checked_shape(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, int, int]:
    """[H, W, C]. Raises ValueError for an array that isn't an image."""
    height, width, channels = (*shape, 1) if len(shape) == 2 else (*shape, 0, 0, 0)[:3]
    if (dtype != np.uint8 and dtype.kind != "f") or channels not in (1, 3) or len(shape) > 3:
        raise ValueError(f"it is {dtype} {list(shape)} instead of uint8 or float32 [H, W, 1 or 3]")
    if not math.prod(shape):
        raise ValueError("it has no pixels")
    return height, width, channels


@contextlib.contextmanager
def _reading_array(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Damaged bytes raise many types of error in NumPy.
        raise UserError(
            f"{what} can't be read as an array of pixels ({first_line(error)}): save it again"
        ) from error
