"""Fashion-MNIST (Xiao et al. 2017), from the files that Debian's package dataset-fashion-mnist installs.

These are the original files, in MNIST's IDX format, compressed with gzip; the licence is MIT. The source
`npz:OUT/fashion_mnist_{split}.npz` reads the files that are written.
"""

import gzip
import math
from typing import NamedTuple

import numpy as np
from etils import epath

from guided_distill.data.source import SPLITS
from guided_distill.errors import UserError
from guided_distill.files import regular_file
from guided_distill.prepare.packages import file_digest
from guided_distill.storage import first_line, npz_bytes, write_bytes

FOLDER = epath.Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "dataset-fashion-mnist"

CLASS_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


class Pinned(NamedTuple):
    """The name of a file and its SHA-256 in hexadecimal."""

    name: str
    sha256: str


FILES = {
    "train": (
        Pinned(
            "train-images-idx3-ubyte.gz",
            "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
        ),
        Pinned(
            "train-labels-idx1-ubyte.gz",
            "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
        ),
    ),
    "test": (
        Pinned(
            "t10k-images-idx3-ubyte.gz",
            "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
        ),
        Pinned(
            "t10k-labels-idx1-ubyte.gz",
            "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
        ),
    ),
}
"""The files of images and labels of each split."""

_MAX_BYTES = 1 << 28


def prepare_fashion_mnist(out: epath.Path, source: epath.Path) -> list[epath.Path]:
    """Writes fashion_mnist_train.npz and fashion_mnist_test.npz into the folder `out`; returns the paths.

    Their fields: image uint8 [N, 28, 28], label int32 [N], class_names [10].

    Args:
      source: folder with the four files in `FILES`.

    Raises:
      UserError: a file is missing, isn't the pinned one, or isn't a complete IDX file.
    """
    for pinned in (each for split in SPLITS for each in FILES[split]):
        _check(source / pinned.name, pinned.sha256)
    paths = []
    for split in SPLITS:
        images, labels = (read_idx(source / pinned.name) for pinned in FILES[split])
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise UserError(
                f"{source}: the {split} files hold images {list(images.shape)} and labels "
                f"{list(labels.shape)}: give the files of Fashion-MNIST"
            )
        paths.append(out / f"fashion_mnist_{split}.npz")
        fields = {"image": images, "label": labels.astype(np.int32)}
        write_bytes(paths[-1], npz_bytes(**fields, class_names=np.array(CLASS_NAMES)))
    return paths


def _check(path: epath.Path, sha256: str) -> None:
    if regular_file(path) is None:
        raise UserError(
            f"{path} is missing: install Debian's package {PACKAGE} (apt-get install {PACKAGE}), or pass "
            f"--from with a folder of its files"
        )
    if file_digest(path, "sha256") != sha256:
        raise UserError(
            f"{path} is not the pinned file (its SHA-256 differs): pass --from with a folder of the "
            f"files from Debian's package {PACKAGE}"
        )


def read_idx(path: epath.Path) -> np.ndarray:
    """Reads the array of unsigned bytes in a gzipped IDX file: uint8, with the shape in its header.

    The header is two zero bytes, 8 for unsigned bytes, the number of dimensions, and the size of each as
    a big-endian uint32. Raises UserError if the content is truncated, too long or of another type.
    """
    try:
        with path.open("rb") as compressed, gzip.open(compressed) as file:
            start = file.read(4)
            if len(start) < 4 or start[:3] != b"\0\0\x08":
                raise ValueError("it doesn't begin like an IDX file of unsigned bytes")
            sizes = file.read(4 * start[3])
            if len(sizes) < 4 * start[3]:
                raise ValueError("it ends within its header")
            shape = tuple(np.frombuffer(sizes, ">u4").tolist())
            count = math.prod(shape)
            if count > _MAX_BYTES:
                raise ValueError(f"its header states the shape {list(shape)}, which is too large")
            content = file.read(count + 1)
            if len(content) != count:
                than = "more" if len(content) > count else "fewer"
                raise ValueError(f"it has {than} than the {count} bytes that its header states")
    except Exception as error:  # Damaged bytes raise many types of error in gzip.
        raise UserError(
            f"{path} can't be read as an IDX file ({first_line(error)}): get it again"
        ) from error
    return np.frombuffer(content, np.uint8).reshape(shape)
