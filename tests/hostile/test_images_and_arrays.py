"""Hostile image files and npz files: what is read equals what Pillow and NumPy read."""

import contextlib
import io
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from folders import write_run
from harness import Case, Refusal, attempt, command
from PIL import Image
from test_json_files import copied

from guided_distill.data import sources
from guided_distill.data.images import read_images, read_mask, size_at
from guided_distill.evaluation.extractors.extractor import Extractor
from guided_distill.evaluation.reference import read_reference
from guided_distill.report import grids, page

FORMATS = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "GIF": ("1", "L", "P"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "YCbCr", "I;16", "I;16B", "I", "F"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB"),
    "PPM": ("L", "RGB"),
    "ICO": ("RGBA",),
    "EPS": ("RGB",),
    "PDF": ("RGB",),
}
SUFFIXES = (".png", ".jpg", ".JPEG", ".gif", ".tif", ".webp", ".bmp", ".jfif")
TURNED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
    8: lambda x: x.swapaxes(0, 1)[::-1],
}
"""The effect of EXIF's orientations on rows and columns."""


def numbers(rng):
    return np.random.default_rng(rng.randrange(2**32))


def picture(rng, size):
    """The bytes of an image file of any format and mode."""
    kind = rng.choice(sorted(FORMATS))
    mode = rng.choice(FORMATS[kind])
    width, height = size
    draw = numbers(rng)
    if mode in ("I;16", "I;16B", "I"):
        values = draw.integers(0, 65536, (height, width))
        image = Image.fromarray(values.astype({"I": "<i4", "I;16B": ">u2"}.get(mode, "<u2")))
    elif mode == "F":
        image = Image.fromarray(draw.normal(size=(height, width)).astype(np.float32))
    else:
        bands = len(Image.new(mode, (1, 1)).getbands())
        image = Image.new(mode, size)
        values = draw.integers(0, 256, (height, width, bands), np.uint8)
        layers = [Image.fromarray(values[..., band]) for band in range(bands)]
        image = layers[0].convert(mode) if bands == 1 else Image.merge(mode, layers)
    options = {}
    if kind in ("PNG", "JPEG", "TIFF", "WEBP") and rng.random() < 0.4:
        options["exif"] = Image.Exif()
        options["exif"][274] = rng.choice((*TURNED, 0, 9))
    if kind in ("PNG", "GIF") and mode in ("P", "L", "RGB") and rng.random() < 0.3:
        options["transparency"] = (1, 2, 3) if mode == "RGB" else 3
    if kind in ("GIF", "TIFF", "PNG", "WEBP") and rng.random() < 0.2:
        options |= {
            "save_all": True,
            "append_images": [image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)],
        }
    print(f"{kind} {mode} {size} {sorted(options)}")
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def damaged(rng, content):
    """The content, intact half of the time; else cut, flipped, extended, or with a false size."""
    draw = rng.random()
    if draw < 0.5:
        return content
    changed = bytearray(content)
    if draw < 0.65:
        return bytes(changed[: rng.randrange(len(changed))])
    if draw < 0.7 and content.startswith(b"\x89PNG"):
        changed[16:24] = rng.choice((b"\0\0\xea\x60" * 2, b"\x7f\xff\xff\xff" * 2, bytes(8)))
        return bytes(changed)
    if draw < 0.95:
        for _ in range(rng.choice((1, 3, 30))):
            # Mostly in the header.
            changed[rng.randrange(min(len(changed), rng.choice((40, 200, 10**6))))] = rng.randrange(
                256
            )
        return bytes(changed)
    return content + rng.randbytes(50)


def put(case, path, content):
    """Write a file with that content, or one whose content can't be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    makers = {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "link to nothing": lambda: path.symlink_to("nothing"),
        "link to itself": lambda: path.symlink_to(path.name),
        "device": lambda: path.symlink_to("/dev/zero"),
        "text": lambda: path.write_text("no picture"),
        "empty": lambda: path.write_bytes(b""),
    }
    if case.rng.random() < 0.1:
        case.kind(makers)()
    else:
        path.write_bytes(damaged(case.rng, content))


def pixels(path):
    """The image as Pillow reads it: RGB [H, W, 3], upright and over white, as floats from 0 to 255."""
    # From a stream, because Pillow doesn't rotate every TIFF file that it maps into memory.
    with path.open("rb") as stream, Image.open(stream) as image:
        image.load()  # This rotates TIFF images.
        turn = TURNED.get(image.getexif().get(274, 1), TURNED[1])
        if image.mode.startswith("I;16"):
            gray = np.asarray(image).astype(float) / 257
            return turn(np.repeat(gray[..., None], 3, axis=-1))
        values = np.asarray(image.convert("RGBA")).astype(float)
        if not image.has_transparency_data:
            values = np.asarray(image.convert("RGB")).astype(float)
    alpha = values[..., 3:] / 255 if values.shape[-1] == 4 else 1.0
    return turn(values[..., :3] * alpha + 255 * (1 - alpha))


def folder_of_images(case):
    """data.name=folder:PATH with one or two classes of two images each."""
    root, size = case.folder / "images", case.rng.choice(((6, 6), (6, 6), (9, 6)))
    for name in ("a", "b")[: case.rng.choice((1, 2))]:
        for index in range(2):
            file = f"{name}{index}{case.rng.choice(SUFFIXES)}"
            put(case, root / name / file, picture(case.rng, size))
    image_size = case.rng.choice((None, None, 5, 6))
    split = case.rng.choice(sources.SPLITS)
    found = attempt(lambda: all_of(f"folder:{root}", split, image_size)["image"])
    if not isinstance(found, Refusal):
        wholes = []
        for file in filter(Path.is_file, root.glob("*/*")):
            with contextlib.suppress(
                OSError, SyntaxError, ValueError
            ):  # An image of the other split.
                wholes.append(fitted(pixels(file), image_size))
        for image in found:
            alike = [whole for whole in wholes if whole.shape == image.shape]
            assert min(largest_error(image, whole) for whole in alike) <= 2


def all_of(name, split, image_size):
    """All examples of a split."""
    source = sources.load_source(name, split=split, image_size=image_size)
    return source.read(np.arange(len(source)))


def largest_error(image, whole):
    """The largest error of an image in [-1, 1], in units of 1 / 255 of the range."""
    return np.abs(np.rint((image + 1) * 127.5) - whole).max()


def fitted(values, size):
    """The largest centred square, resized."""
    if size is None:
        return values
    side = min(values.shape[:2])
    top, left = (values.shape[0] - side) // 2, (values.shape[1] - side) // 2
    square = Image.fromarray(np.rint(values[top : top + side, left : left + side]).astype(np.uint8))
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS)).astype(float)


def one_image(case):
    """An image or a mask that a flag names."""
    path = epath.Path(case.folder / f"image{case.rng.choice(SUFFIXES)}")
    put(
        case, case.folder / path.name, picture(case.rng, case.rng.choice(((8, 8), (1, 1), (30, 2))))
    )
    size = attempt(lambda: size_at(path))
    found = attempt(lambda: read_images(path, shape=(8, 8, 3), limit=1))
    if not isinstance(size, Refusal):
        attempt(lambda: read_mask(path, shape=(8, 8)))
    if not isinstance(found, Refusal):
        whole = pixels(path)
        assert size == whole.shape[1::-1]
        assert largest_error(found[0], fitted(whole, 8)) <= 2


DTYPES = ("u1", "f4", "f8", "f2", "i8", "?", "U3", "S2", "O", "c8", "M8[s]", ">f4", "i1", "V3")
SHAPES = (
    (10, 4, 4, 3),
    (10, 4, 4, 1),
    (10, 4, 4),
    (10, 3, 4, 4),
    (10, 4),
    (10,),
    (),
    (0, 4, 4, 3),
    (2, 4, 5, 3),
)


def array(rng, dtype, shape):
    draw = numbers(rng)
    if dtype == "u1":
        return draw.integers(0, 256, shape, np.uint8)
    if dtype in ("f4", "f8", "f2", ">f4"):
        return np.asarray(draw.uniform(*rng.choice(((-1, 1), (0, 1), (-2, 9))), shape)).astype(
            dtype
        )
    return np.zeros(shape, dtype)


def fields(rng):
    """The fields of an npz file of ten images, of which one or two are invalid."""
    images = array(rng, "u1", (10, 4, 4, 3))
    labels = numbers(rng).integers(0, 3, 10)
    made = {"image": images, "label": labels}
    if rng.random() < 0.3:
        made |= {"test_image": images[:3], "test_label": labels[:3]}
    if rng.random() < 0.3:
        made["caption"] = np.array([f"number {index}" for index in range(10)])
    if rng.random() < 0.3:
        made["class_names"] = np.array(["a", "b", "c"])
    if rng.random() < 0.2:
        made["group"] = np.arange(10) // 2
    if rng.random() < 0.25:
        files = [picture(rng, (4, 4)) for _ in range(10)]
        del made["image"]
        made["jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        made["offset"] = np.cumsum([0, *map(len, files)])
    for _ in range(rng.choice((0, 1, 1, 2))):
        name = rng.choice([*made, "labels", "test_label", "images", "offset"])
        if rng.random() < 0.5:
            made[name] = array(rng, rng.choice(DTYPES), rng.choice(SHAPES))
        elif name in made and made[name].dtype.kind in "iu" and made[name].size:
            made[name] = made[name].astype(rng.choice(("i8", "i4", "u8")))
            odd = np.array(rng.choice((-1, 7, 300, 10**6, 2**31 - 1))).astype(made[name].dtype)
            made[name].flat[rng.randrange(made[name].size)] = odd
        else:
            made.pop(name, None)
    print({name: (each.dtype.str, each.shape) for name, each in made.items()})
    return made


def npz_of_images(case):
    """data.name=npz:PATH: each image of a file is in one of the splits, with its label."""
    path, made = case.folder / "data.npz", fields(case.rng)
    file = io.BytesIO()
    case.rng.choice((np.savez, np.savez_compressed))(file, **made)
    put(case, path, file.getvalue())
    image_size = case.rng.choice((None, None, 4, 7))
    name = f"npz:{path}"
    found = attempt(lambda: [all_of(name, split, image_size) for split in sources.SPLITS])
    if isinstance(found, Refusal) or image_size == 7:
        return
    with np.load(path) as file:
        arrays = {name.rstrip("s"): file[name] for name in sorted(file, reverse=True)}
    if "image" in arrays:
        parts = [rows(arrays, prefix) for prefix in ("", "test_") if f"{prefix}image" in arrays]
        assert sum(map(rows, found), Counter()) == sum(parts, Counter())


def rows(arrays, prefix=""):
    """Count the occurrences of each image, as numbers in [-1, 1], with its label."""
    images = arrays[f"{prefix}image"]
    values = images / np.float32(127.5) - 1 if images.dtype == np.uint8 else np.float32(images)
    labels = arrays.get(f"{prefix}label", np.zeros(len(images)))
    rounded = (each.ravel().round(5).tolist() for each in values)
    return Counter((*numbers, int(label)) for numbers, label in zip(rounded, labels, strict=True))


def samples(case, whole):
    """A run's files of samples, which its report shows."""
    run = copied(case, whole)
    path = case.rng.choice(sorted(each for each in (run / "samples").iterdir()))
    file = io.BytesIO()
    with np.load(path) as arrays:
        made = dict(arrays)
    name = case.rng.choice([*made, "extra"])
    if case.rng.random() < 0.7:
        made[name] = array(case.rng, case.rng.choice(DTYPES), case.rng.choice(SHAPES))
    else:
        made.pop(name, None)
    np.savez(file, **made)
    path.unlink()
    put(case, case.folder / "copy" / "samples" / path.name, file.getvalue())
    verb = case.rng.choice((["report", "--workdir"], ["compare"]))
    command([*verb, str(run)])


def statistics(case):
    """--reference FILE: the mean and covariance used are those in the file."""
    width = 3
    factor = numbers(case.rng).normal(size=(width, width))
    made = {"mu": np.arange(width) * 1.0, "sigma": factor @ factor.T}
    for _ in range(case.rng.choice((0, 1, 1))):
        made[case.rng.choice(("mu", "sigma", "mean"))] = array(
            case.rng,
            case.rng.choice(DTYPES),
            case.rng.choice(((3,), (3, 3), (), (2,), (3, 3, 3), (0,))),
        )
    file = io.BytesIO()
    np.savez(file, **made)
    path = epath.Path(case.folder / "statistics.npz")
    put(case, case.folder / path.name, file.getvalue())
    extractor = Extractor("e", width, False, apply=lambda *_: None, params={}, batch_size=8)
    digits = sources.load_source("digits")
    found = attempt(lambda: read_reference(path, digits, extractor))
    if not isinstance(found, Refusal):
        with np.load(path) as arrays:
            np.testing.assert_array_equal(found.statistics.mean, arrays["mu"])
            np.testing.assert_array_equal(found.statistics.covariance, arrays["sigma"])
        assert np.isfinite(found.statistics.covariance).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run")


KINDS = {each.__name__: each for each in (folder_of_images, one_image, npz_of_images, statistics)}


def test_images_and_arrays(case: Case, run, monkeypatch) -> None:
    for module in (page, grids):
        monkeypatch.setattr(module, "data_url", lambda *_: "data:,")
    case.kind(KINDS | {"samples": lambda case: samples(case, run)})(case)
