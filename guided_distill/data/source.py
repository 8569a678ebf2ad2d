"""What a data source is, and how one is held out for testing."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from guided_distill.data.pixels import from_uint8
from guided_distill.errors import UserError

SPLITS = ("train", "test")

Examples = dict[str, np.ndarray]
"""Arrays [n, ...] by name: "image", and the condition's."""

_CHUNK = 4096
_CHUNK_PARTS = 16
_BYTES = 128 << 20
"""How much of the examples is held at once."""

# Fixed for good: another seed would move test examples of existing runs into their training set.
_SPLIT_SEED = 20221204


@dataclass(frozen=True, eq=False)
class Source:
    """Random access to one split of a labelled data set.

    `read` takes indices [B] in [0, size) and returns new arrays: "image" [B, *shape], float32 and
    in [-1, 1] for pixels, and the arrays of the condition, such as "label" [B], int32 in
    [0, num_classes). Several threads call it.

    condition_shapes: the shapes of one example's condition, by name. null: what stands for none in
    its place, one example's; None for the label num_classes. latent: whether "image" is an
    autoencoder's latents. captions: what is said of each example, [size] strings, where something is.
    labels: those of all examples [size], where they can be had without the images.
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
        """Number of labels; 1 where the data has none, 0 where it has texts in their place."""
        return len(self.class_names)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One example of what `read` returns: "image" [*shape], "label" scalar."""
        example = self.read(np.array([range(self.size)[index]]))
        return {name: each[0] for name, each in example.items()}

    def chunks(self, limit: int | None = None) -> Iterator[Examples]:
        """Yields all examples, some [n, ...] at a time, or a fixed random subset of `limit`."""
        indices = np.arange(self.size)
        if limit is not None and limit < self.size:
            subset = np.random.default_rng(0).permutation(self.size)[:limit]
            indices = np.sort(subset)
        return self.chunks_of(indices)

    def chunks_of(self, indices: np.ndarray) -> Iterator[Examples]:
        """Yields the examples at `indices` in their order, some [n, ...] at a time."""
        size = within_memory(self.shape, most=_CHUNK)
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(indices), size):
                chosen = indices[start : start + size]
                parts = np.array_split(chosen, min(len(chosen), _CHUNK_PARTS))
                yield _joined(pool.map(self.read, parts))

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """The labels [n] at `indices` [n], one or more of them."""
        if self.labels is not None:
            return self.labels[indices]
        distinct, places = np.unique(indices, return_inverse=True)
        return np.concatenate([some["label"] for some in self.chunks_of(distinct)])[places]

    def arrays(self, limit: int | None = None) -> Examples:
        """Reads all examples [N, ...], or a fixed random subset of `limit`."""
        return _joined(self.chunks(limit))


def within_memory(shape: Sequence[int], *, most: int) -> int:
    """How many examples of `shape` to hold at once: `most`, or a half, a quarter, ... of it."""
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

    captions: strings [N], if there are any. rows: the image of each example [N], if they aren't in order.
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
    """Indices of one split, in a fixed shuffled order; every group [N] gives its share to test.

    A group of one stays in train. The two splits are disjoint and together are all N.
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
    """Indices of one split, in a fixed shuffled order; test gets its share of the groups, whole.

    groups: numbers or strings [N]; those alike stay together. Which go to test depends on nothing but
    the set of groups.
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
            f"data.image_size is {image_size}, but examples of {source.name!r} are {size} and this "
            "source is never resized: leave data.image_size unset"
        )
