"""The one reader of image files: every source, mask and image of the command line goes through it.

What a file is, its content says, not its name. It is turned as its EXIF data say, gray of 16 bits is
scaled to 8, transparent pixels are laid over one colour, and the result is RGB. Of a file with several
frames, the first is read.
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
"""Names of files that are taken for images."""

MAX_PIXELS = 89_478_485
"""Pixels that an image may have: above it, Pillow speaks of a decompression bomb."""

_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations of images that are stored lying on a side."""

# Pillow's own way to refuse what is above MAX_PIXELS, before any of it is decoded.
warnings.simplefilter("error", Image.DecompressionBombWarning)


def images_in(folder: epath.Path) -> tuple[list[epath.Path], list[epath.Path]]:
    """What a folder holds, by name: paths that are named like images, and all others; no hidden ones."""
    there = sorted(
        (entry for entry in folder.iterdir() if not entry.name.startswith(".")),
        key=lambda entry: entry.name,
    )
    named = [entry for entry in there if entry.suffix.lower() in SUFFIXES]
    return named, [entry for entry in there if entry.suffix.lower() not in SUFFIXES]


def upright_size(file: File) -> tuple[int, int]:
    """(width, height) of an image, turned upright, by its header. Raises UserError if it is damaged."""
    with _reading(str(file.path)), file.path.open("rb") as stream, _open(stream) as image:
        if image.format == "TIFF":  # Pillow turns it on opening, or on loading, by its version.
            return ImageOps.exif_transpose(image).size
        # A PNG file may have EXIF data behind its pixels, which would all be decoded to get there.
        knows = image.format != "PNG" or "exif" in image.info
        orientation = image.getexif().get(ExifTags.Base.Orientation) if knows else 1
        width, height = image.size
        return (height, width) if orientation in _SIDEWAYS else (width, height)


def size_at(path: epath.Path) -> tuple[int, int]:
    """As `upright_size`, of the file that a user names. Raises UserError if there is none, too."""
    file = regular_file(path)
    if file is None:
        raise UserError(f"no image at {path}: give a file")
    return upright_size(file)


def read_image(path: epath.Path, *, over: str = "white") -> Image.Image:
    """The image in a regular file: RGB, upright, over the colour.

    Raises UserError if there is no such file, or it is damaged.
    """
    if regular_file(path) is None:
        raise UserError(f"no image at {path}: give a file")
    with _reading(str(path)), path.open("rb") as stream, _open(stream) as image:
        return upright(image, over=over)


def decode_image(content: bytes, *, what: str) -> Image.Image:
    """As `read_image`, of a file's bytes; `what` is its name in errors."""
    with _reading(what), _open(io.BytesIO(content)) as image:
        return upright(image)


def upright(image: Image.Image, *, over: str = "white") -> Image.Image:
    """RGB of 8 bits, turned as its EXIF data say, its transparent pixels laid over a colour."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = _of_16_bits(image, over)
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits a pixel, convert it to 8")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, over), image)
    return image.convert("RGB")


def _of_16_bits(image: Image.Image, over: str) -> Image.Image:
    values = np.array(image, np.uint16)
    # One value may stand for what is transparent.
    values[values == image.info.get("transparency", -1)] = 65535 if over == "white" else 0
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def read_images(path: epath.Path, *, shape: Sequence[int], limit: int) -> np.ndarray:
    """A file, or the first `limit` of a folder by name: float32 [n, *shape] in [-1, 1].

    Centre-cropped to squares and resized to shape, which is (size, size, 1 or 3). Raises UserError if
    there is no image, or a damaged one.
    """
    files = images_in(path)[0] if path.is_dir() else [path] if regular_file(path) else []
    if not files:
        raise UserError(f"no images at {path}: give a file, or a folder of {', '.join(SUFFIXES)}")
    return from_uint8(np.stack([fitted(read_image(file), shape) for file in files[:limit]]))


def read_mask(path: epath.Path, *, shape: Sequence[int]) -> np.ndarray:
    """bool [*shape], (size, size), True where an image is white; what is transparent counts as black.

    Raises UserError if it is damaged, or has no white.
    """
    white = fitted(read_image(path, over="black"), (*shape, 1))[..., 0] > 127
    if not white.any():
        raise UserError(
            f"{path} is nowhere white, so nothing would be painted: paint white where to"
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
            f"{what} cannot be read as an image, repair or remove it: it is none of {', '.join(FORMATS)}"
        ) from error
    except Exception as error:  # Whatever damaged bytes raise in Pillow.
        raise UserError(
            f"{what} cannot be read as an image, repair or remove it: {first_line(error)}"
        ) from error
