"""The source `folder:`, image files in one folder per class, decoded when they are read."""

import collections
import functools
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from etils import epath

from guided_distill.data.images import SUFFIXES, images_in, read_image, upright_size
from guided_distill.data.kept import keep, kept, packed, place_of, unpacked, warn_of_change
from guided_distill.data.pixels import crop_and_resize, from_uint8
from guided_distill.data.source import Examples, Source, split_indices
from guided_distill.errors import UserError
from guided_distill.files import File, is_text, read_text, regular_file, warn_once
from guided_distill.places import path_named
from guided_distill.training.progress import progress

_HEADER_THREADS = 16

CAPTIONS = "metadata.jsonl"


LISTED_ONCE = 10_000
"""The list of a folder with this many images is kept until an image is added, removed or renamed."""


@dataclass(frozen=True)
class _Listing:
    """The classes of a folder, its images, their labels [N], and the paths that aren't images.

    sizes: (width, height) of every upright image, [N, 2]. times: `_time` of the folder, by the name "",
    and of its sub-folders.
    """

    class_names: tuple[str, ...]
    files: tuple[epath.Path, ...]
    labels: np.ndarray
    sizes: np.ndarray
    skipped: tuple[epath.Path, ...]
    times: Mapping[str, int | None]


def load_folder(path: str, *, split: str, image_size: int | None) -> Source:
    """Opens a folder of images as RGB. Each sub-folder is a class, in sorted order.

    If `path` itself holds the images, there is one class. With image_size, images are centre-cropped to
    squares and resized; without, all must have the same size. Transparent pixels are composited over
    white. A tenth of each class is the test split. Other files, and folders within a class's folder, are
    skipped with a warning.

    A folder of LISTED_ONCE images is listed once, and its list is kept in the cache folder until the time
    of the folder or of one of its sub-folders changes. Folders in a bucket have no times.

    Captions come from the file CAPTIONS in `path`, in the format of Hugging Face's image folders: each
    line is a JSON object with "file_name", a path below the folder, and "text". An image with several
    lines becomes one example per caption, all in the same split.

    Raises:
      UserError: there are no images, a file is damaged, sizes differ, or some images have captions and
        others don't. Only headers are checked here; damage after the header raises UserError when the
        image is read.
    """
    root = path_named(path)
    listing = _listing_of(root)
    _warn_of_skipped(root, listing)
    files, labels = listing.files, listing.labels
    width, height = listing.sizes[0].tolist()
    size = (width, height) if image_size is None else (image_size, image_size)
    if image_size is None and len(odd := np.flatnonzero(np.any(listing.sizes != size, axis=1))):
        _check_size(files[odd[0]], listing.sizes[odd[0]], expected=size)
    rows = split_indices(labels, split=split, test_fraction=0.1)
    if not len(rows):
        raise UserError(
            f"{path} has too few images for a {split} split: add some, at least two per class"
        )
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
    """The captions of each file, at least one."""
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
    if missing := [file for file, found in texts.items() if not found]:
        raise UserError(f"{path} has no text for {missing[0]}: add a line for it")
    if elsewhere:
        warn_once(
            f"{path} has {elsewhere} lines whose file_name isn't one of the images: they are skipped"
        )
    return [texts[file] for file in files]


def _caption(line: str, *, where: str) -> tuple[str, str]:
    """The file_name and text of a line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: fix it") from error
    if not isinstance(row, dict) or not {"file_name", "text"} <= row.keys():
        raise UserError(f"{where} is not a JSON object with file_name and text: fix it")
    for key in ("file_name", "text"):
        if not is_text(row[key]):
            raise UserError(
                f"{where} has the {key} {json.dumps(row[key])[:50]}: give one string, and a line of its "
                f"own for each caption"
            )
    return row["file_name"], row["text"]


def _listing_of(root: epath.Path) -> _Listing:
    """The listing of a folder, from the cache folder if it is kept there and is still right."""
    path = place_of(f"folder:{root if root.is_absolute() else root.absolute()}").with_suffix(".npz")
    if (found := kept(path)) is not None:
        times, arrays = found
        if all(_time(root / folder) == time for folder, time in times.items()):
            _warn_of_bucket(root, path)
            return _of_arrays(root, times, arrays)
        warn_of_change(str(root), path)
    listing = _list_images(root)
    if len(listing.files) >= LISTED_ONCE:
        keep(path, listing.times, _as_arrays(listing))
    return listing


def _time(folder: epath.Path) -> int | None:
    """When an entry of the folder was last added, removed or renamed; 0 in a bucket, None if missing."""
    if "://" in str(folder):
        return 0
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return None


def _warn_of_bucket(root: epath.Path, path: epath.Path) -> None:
    if "://" in str(root):
        warn_once(
            f"the list of {root} in {path} is used, and folders in a bucket have no times: remove the "
            f"list if images were added or removed"
        )


def _as_arrays(listing: _Listing) -> dict[str, np.ndarray]:
    return {
        "classes": packed(listing.class_names),
        "names": packed([file.name for file in listing.files]),
        "labels": listing.labels,
        "sizes": listing.sizes,
        "skipped": packed([str(each) for each in listing.skipped]),
    }


def _of_arrays(
    root: epath.Path, times: Mapping[str, int | None], arrays: Mapping[str, np.ndarray]
) -> _Listing:
    class_names, labels = unpacked(arrays["classes"]), arrays["labels"]
    folders = [root / name for name in class_names] if len(times) > 1 else [root]
    return _Listing(
        tuple(class_names),
        tuple(
            folders[label] / name
            for label, name in zip(labels, unpacked(arrays["names"]), strict=True)
        ),
        labels,
        arrays["sizes"],
        tuple(epath.Path(each) for each in unpacked(arrays["skipped"])),
        times,
    )


def _list_images(root: epath.Path) -> _Listing:
    if not root.is_dir():
        raise UserError(f"no folder {root}: give folder:PATH with the path of a folder of images")
    times = {"": _time(root)}
    loose, others = images_in(root)
    folders = [entry for entry in others if entry.is_dir()]
    if loose and folders:
        raise UserError(
            f"{root} has both images, such as {loose[0].name}, and folders, such as "
            f"{folders[0].name}: keep one folder per class, or only images"
        )
    classes = [root] if loose else folders
    if not classes:
        raise UserError(f"no images in {root}: add {', '.join(SUFFIXES)} files")
    skipped = [each for each in others if each not in folders and each.name != CAPTIONS]
    files, labels = [], []
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        for label, folder in enumerate(classes):
            if folder != root:
                times[folder.name] = _time(folder)
            named, others = (loose, []) if folder == root else images_in(folder)
            found = list(pool.map(regular_file, named))
            images = [file for file in found if file is not None]
            skipped += others
            skipped += [path for path, file in zip(named, found, strict=True) if file is None]
            if not images:
                raise UserError(f"no images in {folder}: add some, or remove this folder")
            files += images
            labels += [label] * len(images)
    names = tuple(folder.name for folder in classes)
    sizes = np.array(_header_sizes(tuple(files)), np.int32)
    paths = tuple(file.path for file in files)
    return _Listing(names, paths, np.array(labels, np.int32), sizes, tuple(skipped), times)


def _warn_of_skipped(root: epath.Path, listing: _Listing) -> None:
    if not listing.skipped:
        return
    kinds = collections.Counter(path.suffix.lower() or "no suffix" for path in listing.skipped)
    counts = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common(5))
    warn_once(
        f"{root}: {len(listing.files)} images are read, and {len(listing.skipped)} other files and "
        f"folders are skipped ({counts}; such as {listing.skipped[0]}): images are files named "
        f"{', '.join(SUFFIXES)}, directly in a class's folder"
    )


@functools.lru_cache(maxsize=4)
def _header_sizes(files: tuple[File, ...]) -> list[tuple[int, int]]:
    """(width, height) of each upright image; cached, because both splits need them."""
    sizes = []
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        found = pool.map(upright_size, files)
        if len(files) < LISTED_ONCE:
            return list(found)
        with progress("listing images", total=len(files), unit="images") as advance:
            for size in found:
                sizes.append(size)
                advance(len(sizes), "")
    return sizes


def _decode(file: epath.Path, size: Sequence[int], *, resize: bool) -> np.ndarray:
    """The pixels, uint8 [H, W, 3], of an upright image composited over white."""
    image = read_image(file)
    if resize:
        image = crop_and_resize(image, size[0])
    _check_size(file, image.size, expected=size)
    return np.asarray(image)


def _check_size(file: epath.Path, size: Sequence[int], *, expected: Sequence[int]) -> None:
    if tuple(size) != tuple(expected):
        raise UserError(
            f"{file} is {size[0]} x {size[1]}, but others are {expected[0]} x {expected[1]}: set "
            "data.image_size to resize all images"
        )
