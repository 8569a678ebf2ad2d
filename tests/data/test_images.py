"""Reading image files."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from etils import epath
from PIL import Image

from guided_distill.data.images import MAX_PIXELS, decode_image, read_images, read_mask
from guided_distill.errors import UserError


def file_of(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(image, kind, **options):
    return np.asarray(decode_image(file_of(image, kind, **options), what="x"))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG"])
def test_formats_are_recognized_by_content(kind):
    pixels = decoded(Image.new("RGB", (4, 4), (200, 100, 50)), kind)
    assert np.abs(pixels.astype(int) - (200, 100, 50)).max() <= 2


def test_16_bit_gray_is_scaled():
    values = np.array([[0, 128, 129, 257], [25700, 32896, 65406, 65535]], np.uint16)
    pixels = decoded(Image.fromarray(values), "PNG")
    expected = [[0, 0, 1, 1], [100, 128, 254, 255]]  # 65535 / 255 is 257.
    np.testing.assert_array_equal(pixels, np.repeat(np.array(expected)[..., None], 3, axis=-1))


def test_transparent_pixels_of_16_bit_gray_are_white():
    values = np.full((4, 4), 500, np.uint16)
    values[0] = 7
    png = file_of(Image.fromarray(values), "PNG")
    # Insert the chunk tRNS, which makes one gray value transparent, before the pixels.
    chunk = b"tRNS" + struct.pack(">H", 7)
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    pixels = np.asarray(decode_image(png[:33] + chunk + png[33:], what="x"))
    assert (pixels[0] == 255).all()
    assert (pixels[1:] == 2).all()


def test_half_transparent_pixels_are_half_white():
    pixels = decoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "PNG")
    assert (pixels == 127).all()


def test_images_are_rotated_by_their_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # Stored rotated: the upper row belongs in the right column.
    image = Image.fromarray(np.array([[9, 9, 9], [0, 0, 0]], np.uint8))
    for kind in ("PNG", "TIFF"):
        pixels = decoded(image, kind, exif=exif)
        np.testing.assert_array_equal(pixels[..., 0], [[0, 9]] * 3)


def bomb(side):
    """A PNG file without pixels whose header states this side."""
    png = file_of(Image.new("1", (1, 1)), "PNG")
    header = b"IHDR" + struct.pack(">II", side, side) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n0 0 9 9 rectfill\n%%EOF\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (EPS, "it isn't PNG, JPEG"),
        (b"", "it isn't PNG, JPEG"),
        (bomb(int(MAX_PIXELS**0.5) + 1), ""),
        (bomb(60_000), ""),
        (file_of(Image.effect_noise((64, 64), 99), "PNG")[:900], ""),
        (file_of(Image.fromarray(np.zeros((4, 4), np.int32)), "TIFF"), "32 bits per pixel"),
    ],
)
def test_other_files_are_refused_by_name(content, reason):
    with pytest.raises(
        UserError, match=rf"x\.png can't be read as an image \(.*{reason}.*: repair"
    ):
        decode_image(content, what="x.png")


def test_a_mask_of_strokes_on_transparency_is_its_strokes(tmp_path):
    strokes = np.zeros((8, 8, 4), np.uint8)
    strokes[2:4, 5:] = 255
    path = epath.Path(tmp_path / "mask.png")
    Image.fromarray(strokes).save(path)
    np.testing.assert_array_equal(read_mask(path, shape=(8, 8)), strokes[..., 3] == 255)
    strokes[..., :3] = 0
    Image.fromarray(strokes).save(path)
    with pytest.raises(UserError, match=r"mask\.png has no white pixel"):
        read_mask(path, shape=(8, 8))


def test_pipes_are_not_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=r"no images at .*pipe\.png"):
        read_images(epath.Path(tmp_path / "pipe.png"), shape=(4, 4, 3), limit=1)
    with pytest.raises(UserError, match=r"no image at .*pipe\.png"):
        read_mask(epath.Path(tmp_path / "pipe.png"), shape=(4, 4))
