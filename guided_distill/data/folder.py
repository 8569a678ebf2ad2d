"""Image files in folders, one a class, decoded when they are asked for."""

import collections
import functools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from etils import epath

from guided_distill.data.images import SUFFIXES, images_in, read_image, upright_size
from guided_distill.data.pixels import crop_and_resize, from_uint8
from guided_distill.data.source import Examples, Source, split_indices
from guided_distill.errors import UserError
from guided_distill.files import File, is_text, read_text, regular_file, warn_once
from guided_distill.places import path_named

_HEADER_THREADS = 16

CAPTIONS = "metadata.jsonl"


@dataclass(frozen=True)
class _Listing:
    """The classes of a folder, its images with a class index each, and what lies there besides."""

    class_names: tuple[str, ...]
    files: tuple[File, ...]
    labels: np.ndarray
    skipped: tuple[epath.Path, ...]


def load_folder(path: str, *, split: str, image_size: int | None) -> Source:
    """RGB images; a class is a sub-folder, by sorted name, or all images directly in `path`.

    With image_size, images are centre-cropped to squares and resized; without, all must be of one
    size. Transparent pixels are laid over white. A tenth of each class is the test split. Files that
    are no images, and folders in the classes' folders, are skipped, with a warning.

    Captions come from a file CAPTIONS in `path`, as Hugging Face's image folders have it: a JSON object
    a line, with "file_name", a path below the folder, and "text". An image with several lines is an
    example with each of its captions, all in the same split.

    Raises:
      UserError: no images, a damaged file, sizes that differ, or an image without a caption where
        others have one. Headers are checked here; damage behind the header surfaces when the image is
        read.
    """
    root = path_named(path)
    listing = _list_images(root)
    _warn_of_skipped(root, listing)
    files, labels = [file.path for file in listing.files], listing.labels
    sizes = _header_sizes(listing.files)
    size = (image_size, image_size) if image_size is not None else sizes[0]
    if image_size is None:
        for file, found in zip(files, sizes, strict=True):
            _check_size(file, found, expected=size)
    rows = split_indices(labels, split=split, test_fraction=0.1)
    if not len(rows):
        raise UserError(f"{path} has too few images for a {split} split: two a class are needed")
    captions = None
    if (root / CAPTIONS).exists():
        texts = _captions(root, files)
        captions = np.array([text for row in rows for text in texts[row]], object)
        rows = np.repeat(rows, [len(texts[row]) for row in rows])

    def read(indices: np.ndarray) -> Examples:
        chosen = rows[indices]
        pixels = np.stack([_decode(files[i], size, resize=image_size is not None) for i in chosen])
        return {"image": from_uint8(pixels), "label": labels[chosen]}

    return Source(
        name=f"folder:{path}",
        split=split,
        shape=(size[1], size[0], 3),
        size=len(rows),
        class_names=listing.class_names,
        read=read,
        captions=captions,
        labels=labels[rows],
    )


def _captions(root: epath.Path, files: Sequence[epath.Path]) -> list[list[str]]:
    """The texts of each file, one or more."""
    path = root / CAPTIONS
    texts: dict[epath.Path, list[str]] = {file: [] for file in files}
    elsewhere = 0
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        name, text = _caption(line, where=f"{path}, line {number},")
        if (root / name) in texts:
            texts[root / name].append(text)
        else:
            elsewhere += 1
    if missing := [file for file, those in texts.items() if not those]:
        raise UserError(f"{path} has no text for {missing[0]}: add a line for it")
    if elsewhere:
        warn_once(f"{path} has {elsewhere} lines whose file_name is none of the images: skipped")
    return [texts[file] for file in files]


def _caption(line: str, *, where: str) -> tuple[str, str]:
    """file_name and text of a line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON: mend it") from error
    if not isinstance(row, dict) or not {"file_name", "text"} <= row.keys():
        raise UserError(f"{where} is no JSON object with file_name and text: mend it")
    for key in ("file_name", "text"):
        if not is_text(row[key]):
            raise UserError(
                f"{where} has the {key} {json.dumps(row[key])[:50]}: give one string; another caption of "
                f"the same image is another line"
            )
    return row["file_name"], row["text"]


def _list_images(root: epath.Path) -> _Listing:
    if not root.is_dir():
        raise UserError(f"no folder {root}: give folder: the path of a folder of images")
    loose, others = images_in(root)
    folders = [entry for entry in others if entry.is_dir()]
    if loose and folders:
        raise UserError(
            f"{root} has both images, such as {loose[0].name}, and folders, such as "
            f"{folders[0].name}: keep one folder a class, or only images"
        )
    classes = [root] if loose else folders
    if not classes:
        raise UserError(f"no images in {root}: expected {', '.join(SUFFIXES)} files")
    skipped = [each for each in others if each not in folders and each.name != CAPTIONS]
    files, labels = [], []
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        for label, folder in enumerate(classes):
            named, others = (loose, []) if folder == root else images_in(folder)
            found = list(pool.map(regular_file, named))
            images = [file for file in found if file is not None]
            skipped += others
            skipped += [path for path, file in zip(named, found, strict=True) if file is None]
            if not images:
                raise UserError(f"no images in {folder}: fill or remove this folder")
            files += images
            labels += [label] * len(images)
    names = tuple(folder.name for folder in classes)
    return _Listing(names, tuple(files), np.array(labels, np.int32), tuple(skipped))


def _warn_of_skipped(root: epath.Path, listing: _Listing) -> None:
    if not listing.skipped:
        return
    kinds = collections.Counter(path.suffix.lower() or "no suffix" for path in listing.skipped)
    words = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common(5))
    warn_once(
        f"{root}: {len(listing.files)} images are read, and {len(listing.skipped)} other files and "
        f"folders skipped ({words}; such as {listing.skipped[0]}): images are files named "
        f"{', '.join(SUFFIXES)}, directly in the folder of a class"
    )


@functools.lru_cache(maxsize=4)
def _header_sizes(files: tuple[File, ...]) -> list[tuple[int, int]]:
    """(width, height) of each, upright; kept, for both splits need them and headers take long."""
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        return list(pool.map(upright_size, files))


def _decode(file: epath.Path, size: Sequence[int], *, resize: bool) -> np.ndarray:
    """Pixels uint8 [H, W, 3] of an upright image over white."""
    image = read_image(file)
    if resize:
        image = crop_and_resize(image, size[0])
    _check_size(file, image.size, expected=size)
    return np.asarray(image)


def _check_size(file: epath.Path, size: Sequence[int], *, expected: Sequence[int]) -> None:
    if tuple(size) != tuple(expected):
        raise UserError(
            f"{file} is {size[0]} x {size[1]} and others are {expected[0]} x {expected[1]}: set "
            "data.image_size to resize them all"
        )
