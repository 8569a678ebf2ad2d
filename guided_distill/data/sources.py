"""Data sources by name."""

from collections.abc import Callable

from guided_distill.data import builtin
from guided_distill.data.arrayrecord import load_arrayrecord
from guided_distill.data.datasets_library import load_hf
from guided_distill.data.encoded import load_encoded
from guided_distill.data.folder import load_folder
from guided_distill.data.npz import load_npz
from guided_distill.data.parquet import load_parquet
from guided_distill.data.photo10 import photo10
from guided_distill.data.source import SPLITS, Source, check_image_size
from guided_distill.data.tfds import load_tfds
from guided_distill.data.webdataset import load_webdataset
from guided_distill.errors import UserError

BUILT_IN: dict[str, Callable[[str, int], Source]] = {
    "digits": lambda split, _: builtin.digits(split),
    "photo10": lambda split, _: photo10(split),
    "mixture2d": lambda split, seed: builtin.mixture2d(split, seed=seed),
}
"""f(split, seed) of each source that is part of the package."""

READERS: dict[str, Callable[..., Source]] = {
    "npz:PATH": load_npz,
    "folder:PATH": load_folder,
    "tfds:NAME": load_tfds,
    "encoded:PATH": lambda place, *, split, image_size: load_encoded(place, split=split),
    "parquet:PATH": load_parquet,
    "arrayrecord:PATH": load_arrayrecord,
    "webdataset:PATH": load_webdataset,
    "hf:NAME": load_hf,
}
"""f(place, split=, image_size=) of each source whose name has a PATH or NAME."""

KNOWN = (*BUILT_IN, *READERS)


def load_source(
    name: str, *, split: str = "train", image_size: int | None = None, seed: int = 0
) -> Source:
    """Opens one split of a data source.

    Args:
      name: one of `KNOWN`; a PATH may be on any file system that etils.epath reads.
      split: "train" or "test"; which examples are in a split doesn't depend on seed.
      image_size: side in pixels. Images of files, unless they are arrays of floats, are resized to it;
        those of other sources must already have it.
      seed: determines the points of mixture2d, and nothing else.

    Raises:
      UserError: the name or split is unknown, or the data can't be read.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of data source {name!r}: use train or test")
    kind, _, place = name.partition(":")
    readers = {known.partition(":")[0]: read for known, read in READERS.items()}
    if kind in readers and place:
        source = readers[kind](place, split=split, image_size=image_size)
    elif name in BUILT_IN:
        source = BUILT_IN[name](split, seed)
    else:
        raise UserError(f"unknown data source {name!r}: use one of {', '.join(KNOWN)}")
    check_image_size(source, image_size)
    return source
