"""Data sources: random access to labelled examples, and the test split held out from them."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from guided_distill.data.pixels import from_uint8
from guided_distill.errors import UserError

SPLITS = ("train", "test")
SPLIT = "{split}"
"""Stands for the name of a split in the path of a source."""

TEST_FRACTION = 0.1
"""The share of the examples that the test split of files without one holds."""

Examples = dict[str, np.ndarray]
"""Arrays [n, ...] by name: "image" and those of the condition."""

_CHUNK = 4096
_CHUNK_PARTS = 16
_BYTES = 128 << 20
"""The most bytes of examples in memory at once."""

# Never change it: another seed would move test examples of existing runs into their training set.
_SPLIT_SEED = 20221204


@dataclass(frozen=True, eq=False)
class Source:
    """Random access to one split of a labelled data set.

    `read` takes indices [B] in [0, size) and returns new arrays: "image" [B, *shape], float32 and
    in [-1, 1] for pixels, and the arrays of the condition, such as "label" [B], int32 in
    [0, num_classes). Several threads call it.

    condition_shapes: the shapes of one example's condition, by name. null: the null condition of one
    example; None if it is the label num_classes. latent: whether "image" is an autoencoder's latents.
    captions: strings [size], or None. labels: [size], or None if they can't be read without the images.
    """

    name: str
    split: str
    shape: tuple[int, ...]
    size: int
    class_names: tuple[str, ...] = field(repr=False)
    read: Callable[[np.ndarray], Examples] = field(repr=False)
    condition_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"label": ()})
    null: Examples | None = field(default=None, repr=False)
    latent: bool = False
    captions: np.ndarray | None = field(default=None, repr=False)
    labels: np.ndarray | None = field(default=None, repr=False)

    @property
    def num_classes(self) -> int:
        """The number of classes: 1 for data without labels, 0 for data with captions instead."""
        return len(self.class_names)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One example as `read` returns it: "image" [*shape], "label" a scalar."""
        example = self.read(np.array([range(self.size)[index]]))
        return {name: each[0] for name, each in example.items()}

    def chunks(self, limit: int | None = None) -> Iterator[Examples]:
        """Yields all examples, or a fixed random subset of `limit`, in chunks [n, ...]."""
        indices = np.arange(self.size)
        if limit is not None and limit < self.size:
            subset = np.random.default_rng(0).permutation(self.size)[:limit]
            indices = np.sort(subset)
        return self.chunks_of(indices)

    def chunks_of(self, indices: np.ndarray) -> Iterator[Examples]:
        """Yields the examples at `indices`, in that order, in chunks [n, ...]."""
        size = within_memory(self.shape, most=_CHUNK)
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(indices), size):
                chosen = indices[start : start + size]
                parts = np.array_split(chosen, min(len(chosen), _CHUNK_PARTS))
                yield _joined(pool.map(self.read, parts))

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """The labels [n] at `indices` [n], n >= 1."""
        if self.labels is not None:
            return self.labels[indices]
        distinct, places = np.unique(indices, return_inverse=True)
        return np.concatenate([chunk["label"] for chunk in self.chunks_of(distinct)])[places]

    def arrays(self, limit: int | None = None) -> Examples:
        """Reads all examples [N, ...], or a fixed random subset of `limit`."""
        return _joined(self.chunks(limit))


def within_memory(shape: Sequence[int], *, most: int) -> int:
    """How many examples of `shape` fit into memory at once: `most`, or a half, a quarter, ... of it."""
    size = most
    while size > 1 and size * math.prod(shape) * np.dtype(np.float32).itemsize > _BYTES:
        size //= 2
    return size


def _joined(parts: Iterable[Examples]) -> Examples:
    parts = list(parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def from_arrays(
    name: str,
    *,
    split: str,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    captions: np.ndarray | None = None,
    rows: np.ndarray | None = None,
) -> Source:
    """Builds a source of N examples over images [M, ...], uint8 pixels or floats, and labels [N].

    captions: strings [N], or None. rows: indices [N] of the examples' images, None for 0 ... N-1.
    """
    labels = labels.astype(np.int32)

    def read(indices: np.ndarray) -> Examples:
        chosen = images[indices if rows is None else rows[indices]]
        of_bytes = chosen.dtype == np.uint8
        pixels = from_uint8(chosen) if of_bytes else chosen.astype(np.float32, copy=False)
        return {"image": pixels, "label": labels[indices]}

    return Source(
        name=name,
        split=split,
        shape=images.shape[1:],
        size=len(labels),
        class_names=tuple(class_names),
        read=read,
        captions=captions,
        labels=labels,
    )


def split_indices(groups: np.ndarray, *, split: str, test_fraction: float) -> np.ndarray:
    """The indices of one split, in a fixed random order; test takes test_fraction of every group.

    groups: numbers [N]. A group with one member stays in train. The splits are disjoint and cover all N.
    """
    rng = np.random.default_rng(_SPLIT_SEED)
    by_group = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    chosen = []
    for members in by_group:
        count = max(1, round(test_fraction * len(members))) if len(members) > 1 else 0
        shuffled = rng.permutation(members)
        chosen.append(shuffled[:count] if split == "test" else shuffled[count:])
    indices = np.concatenate(chosen)
    return np.random.default_rng(_SPLIT_SEED).permutation(indices)


def split_whole_groups(groups: np.ndarray, *, split: str, test_fraction: float) -> np.ndarray:
    """The indices of one split, in a fixed random order; test takes test_fraction of the groups.

    groups: numbers or strings [N]; members of a group are in the same split. Which groups are in test
    depends only on the set of groups.
    """
    names, group = np.unique(groups, return_inverse=True)
    chosen = split_indices(np.zeros(len(names), int), split=split, test_fraction=test_fraction)
    indices = np.flatnonzero(np.isin(group, chosen))
    return np.random.default_rng(_SPLIT_SEED).permutation(indices)


def check_image_size(source: Source, image_size: int | None) -> None:
    """Raises UserError unless the source's images are image_size squares (None: any size)."""
    if image_size is not None and source.shape[:2] != (image_size, image_size):
        size = " x ".join(map(str, source.shape))
        raise UserError(
            f"data.image_size is {image_size}, but examples of {source.name!r} are {size}, and this "
            "source can't be resized: leave data.image_size unset"
        )
