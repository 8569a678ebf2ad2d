"""Image files in folders, one a class, decoded when they are asked for."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath
from PIL import Image

from guided_distill.data.pixels import (
    DAMAGED,
    crop_and_resize,
    fitted,
    from_uint8,
    upright_over_white,
)
from guided_distill.data.source import Examples, Source, split_indices
from guided_distill.errors import UserError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_HEADER_THREADS = 16

CAPTIONS = "metadata.jsonl"


def load(path: str, *, split: str, image_size: int | None) -> Source:
    """RGB images; a class is a sub-folder, by sorted name, or all images directly in `path`.

    With image_size, images are centre-cropped to squares and resized; without, all must be of one
    size. Transparent pixels are laid over white. A tenth of each class is the test split. Captions come
    from a file CAPTIONS in `path`, as Hugging Face's image folders have it: a JSON object a line, with
    "file_name", a path below the folder, and "text".

    Raises:
      UserError: no images, a damaged file, sizes that differ, or an image without a caption where
        others have one. Headers are checked here; damage behind the header surfaces when the image is
        read.
    """
    root = epath.Path(path)
    class_names, files, labels = _list_images(root)
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        sizes = list(pool.map(_header_size, files))
    size = (image_size, image_size) if image_size is not None else sizes[0]
    if image_size is None:
        for file, found in zip(files, sizes, strict=True):
            _check_size(file, found, expected=size)
    indices = split_indices(labels, split=split, test_fraction=0.1)
    if not len(indices):
        raise UserError(f"{path} has too few images for a {split} split: two a class are needed")
    captions = _captions(root, files)[indices] if (root / CAPTIONS).exists() else None
    files, labels = [files[i] for i in indices], labels[indices]

    def read(indices: np.ndarray) -> Examples:
        pixels = np.stack([_decode(files[i], size, resize=image_size is not None) for i in indices])
        return {"image": from_uint8(pixels), "label": labels[indices]}

    return Source(
        name=f"folder:{path}",
        split=split,
        shape=(size[1], size[0], 3),
        size=len(files),
        class_names=tuple(class_names),
        read=read,
        captions=captions,
    )


def read_images(path: epath.Path, *, shape: tuple[int, ...], limit: int) -> np.ndarray:
    """A file, or the first `limit` of a folder by name: float32 [n, *shape] in [-1, 1].

    Centre-cropped to squares and resized to shape, which is (size, size, 1 or 3). Raises UserError if
    there is no image, or a damaged one.
    """
    files = [path] if path.is_file() else _images_in(path) if path.is_dir() else []
    if not files:
        raise UserError(f"no images at {path}: give a file, or a folder of {', '.join(_SUFFIXES)}")
    pixels = []
    for file in files[:limit]:
        _header_size(file)
        pixels.append(fitted(_open(file), shape))
    return from_uint8(np.stack(pixels))


def _captions(root: epath.Path, files: Sequence[epath.Path]) -> np.ndarray:
    path = root / CAPTIONS
    texts = {}
    for number, line in enumerate(path.read_text().rstrip("\n").split("\n"), start=1):
        try:
            row = json.loads(line)
            texts[root / row["file_name"]] = str(row["text"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}, line {number}, is no JSON object with file_name and text: mend it"
            ) from error
    if missing := [file for file in files if file not in texts]:
        raise UserError(f"{path} has no text for {missing[0]}: add a line for it")
    return np.array([texts[file] for file in files], object)


def _list_images(root: epath.Path) -> tuple[list[str], list[epath.Path], np.ndarray]:
    """Class names, files, and the class index [N] of each file."""
    if not root.is_dir():
        raise UserError(f"no folder {root}: give folder: the path of a folder of images")
    folders = sorted(
        (entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")),
        key=lambda entry: entry.name,
    )
    loose = _images_in(root)
    if loose and folders:
        raise UserError(
            f"{root} has both images, such as {loose[0].name}, and folders, such as "
            f"{folders[0].name}: keep one folder a class, or only images"
        )
    classes = [root] if loose else folders
    if not classes:
        raise UserError(f"no images in {root}: expected {', '.join(_SUFFIXES)} files")
    files, labels = [], []
    for label, folder in enumerate(classes):
        found = _images_in(folder)
        if not found:
            raise UserError(f"no images in {folder}: fill or remove this folder")
        files += found
        labels += [label] * len(found)
    return [folder.name for folder in classes], files, np.array(labels, np.int32)


def _images_in(folder: epath.Path) -> list[epath.Path]:
    found = [
        entry
        for entry in folder.iterdir()
        if entry.suffix.lower() in _SUFFIXES and not entry.name.startswith(".")
    ]
    return sorted(found, key=lambda entry: entry.name)


def _header_size(file: epath.Path) -> tuple[int, int]:
    """(width, height) as stored."""
    try:
        with file.open("rb") as stream, Image.open(stream) as image:
            size, mode = image.size, image.mode
    except DAMAGED as error:
        raise _damaged(file, error) from error
    if mode.startswith("I") or mode == "F":
        raise UserError(f"{file} has more than 8 bits a channel: convert it to 8 bits")
    return size


def _decode(file: epath.Path, size: Sequence[int], *, resize: bool) -> np.ndarray:
    """Pixels uint8 [H, W, 3] of an upright image over white."""
    image = _open(file)
    if resize:
        image = crop_and_resize(image, size[0])
    _check_size(file, image.size, expected=size)
    return np.asarray(image)


def _open(file: epath.Path) -> Image.Image:
    try:
        with file.open("rb") as stream, Image.open(stream) as image:
            return upright_over_white(image)
    except DAMAGED as error:
        raise _damaged(file, error) from error


def _check_size(file: epath.Path, size: Sequence[int], *, expected: Sequence[int]) -> None:
    if tuple(size) != tuple(expected):
        raise UserError(
            f"{file} is {size[0]} x {size[1]} and others are {expected[0]} x {expected[1]}: set "
            "data.image_size to resize them all"
        )


def _damaged(file: epath.Path, error: Exception) -> UserError:
    return UserError(f"{file} cannot be read as an image, repair or remove it: {error}")
