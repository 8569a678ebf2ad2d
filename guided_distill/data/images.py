"""Reads image files: those of every data source, every mask and every image on the command line.

The format is recognized by the file's content, not by its name. The image is rotated by its EXIF
orientation, 16-bit gray is scaled to 8 bits, transparent pixels are composited over one colour, and the
result is RGB. Only the first of several frames is read.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
from etils import epath
from PIL import ExifTags, Image, ImageOps

from guided_distill.data.pixels import fitted, from_uint8
from guided_distill.errors import UserError
from guided_distill.files import File, regular_file
from guided_distill.storage import first_line

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Suffixes of the files that count as images."""

MAX_PIXELS = 89_478_485
"""The most pixels in an image; above this, Pillow warns of a decompression bomb."""

_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""

# So Pillow refuses images of more than MAX_PIXELS before decoding them.
warnings.simplefilter("error", Image.DecompressionBombWarning)


def images_in(folder: epath.Path) -> tuple[list[epath.Path], list[epath.Path]]:
    """Splits a folder's paths, sorted and without hidden ones, into images (by suffix) and others."""
    paths = sorted(
        (entry for entry in folder.iterdir() if not entry.name.startswith(".")),
        key=lambda entry: entry.name,
    )
    named = [entry for entry in paths if entry.suffix.lower() in SUFFIXES]
    return named, [entry for entry in paths if entry.suffix.lower() not in SUFFIXES]


def upright_size(file: File) -> tuple[int, int]:
    """(width, height) of the upright image, from its header. Raises UserError if it is damaged."""
    with _reading(str(file.path)), file.path.open("rb") as stream:
        return _upright_size(stream)


def upright_size_in(stream: IO[bytes], *, what: str) -> tuple[int, int]:
    """Like `upright_size`, for an open file. what: the file's name in errors."""
    with _reading(what):
        return _upright_size(stream)


def _upright_size(stream: IO[bytes]) -> tuple[int, int]:
    with _open(stream) as image:
        # Some versions of Pillow rotate a TIFF file on opening, others on loading.
        if image.format == "TIFF":
            return ImageOps.exif_transpose(image).size
        # A PNG file can have EXIF data after its pixels; reading them would decode all pixels.
        has_exif = image.format != "PNG" or "exif" in image.info
        orientation = image.getexif().get(ExifTags.Base.Orientation) if has_exif else 1
        width, height = image.size
        return (height, width) if orientation in _SIDEWAYS else (width, height)


def size_at(path: epath.Path) -> tuple[int, int]:
    """Like `upright_size`, for a path. Raises UserError also if there is no such file."""
    file = regular_file(path)
    if file is None:
        raise UserError(f"no image at {path}: give the path of an image file")
    return upright_size(file)


def read_image(path: epath.Path, *, over: str = "white") -> Image.Image:
    """The image in a regular file: RGB, upright, composited over the colour `over`.

    Raises UserError if the file is missing or damaged.
    """
    if regular_file(path) is None:
        raise UserError(f"no image at {path}: give the path of an image file")
    with _reading(str(path)), path.open("rb") as stream, _open(stream) as image:
        return upright(image, over=over)


def decode_image(content: bytes, *, what: str) -> Image.Image:
    """Like `read_image`, for a file's bytes. what: the file's name in errors."""
    with _reading(what), _open(io.BytesIO(content)) as image:
        return upright(image)


def upright(image: Image.Image, *, over: str = "white") -> Image.Image:
    """The image as 8-bit RGB, rotated by its EXIF orientation and composited over the colour `over`."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = _of_16_bits(image, over)
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits per pixel instead of 8 or 16")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, over), image)
    return image.convert("RGB")


def _of_16_bits(image: Image.Image, over: str) -> Image.Image:
    values = np.array(image, np.uint16)
    # The file may reserve one value for transparent pixels.
    values[values == image.info.get("transparency", -1)] = 65535 if over == "white" else 0
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def read_images(path: epath.Path, *, shape: Sequence[int], limit: int) -> np.ndarray:
    """The image in a file, or the first `limit` of a folder by name: float32 [n, *shape] in [-1, 1].

    Images are centre-cropped to squares and resized. shape: (size, size, 1 or 3). Raises UserError if
    there is no image, or if one is damaged.
    """
    files = images_in(path)[0] if path.is_dir() else [path] if regular_file(path) else []
    if not files:
        raise UserError(f"no images at {path}: give a file, or a folder of {', '.join(SUFFIXES)}")
    return from_uint8(np.stack([fitted(read_image(file), shape) for file in files[:limit]]))


def read_mask(path: epath.Path, *, shape: Sequence[int]) -> np.ndarray:
    """A mask, bool [*shape], from an image: True where it is white; transparent pixels count as black.

    shape: (size, size). Raises UserError if the image is missing or damaged, or has no white pixel.
    """
    white = fitted(read_image(path, over="black"), (*shape, 1))[..., 0] > 127
    if not white.any():
        raise UserError(
            f"{path} has no white pixel, so nothing would be painted: make the region to paint white"
        )
    return white


def _open(stream: IO[bytes]) -> Image.Image:
    image = Image.open(stream, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
    return image


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        yield
    except Image.UnidentifiedImageError as error:
        raise UserError(
            f"{what} can't be read as an image (it isn't {', '.join(FORMATS[:-1])} or {FORMATS[-1]}): "
            f"repair or remove it"
        ) from error
    except Exception as error:  # Damaged bytes raise many types of error in Pillow.
        raise UserError(
            f"{what} can't be read as an image ({first_line(error)}): repair or remove it"
        ) from error
