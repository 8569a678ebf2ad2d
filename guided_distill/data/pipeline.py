"""Endless shuffled batches of a source, resumable at any step.

Order is decided a batch at a time: examples are numbered along an endless stream in which epoch e
holds the whole source once, permuted by (seed, e). Step k of all processes together takes the k-th
block of that stream. So the global batch depends on its size alone, not on the number of processes,
and the state of an iterator is one step number.
"""

import functools
import os
import sys
from dataclasses import dataclass

import grain
import numpy as np

from guided_distill.data.source import Examples, Source
from guided_distill.errors import UserError

_MAX_THREADS = 16


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    flip: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Iterates for ever over what the source reads: "image" [B, *shape], "label" [B] and the like.

    Every epoch visits each example exactly once, over all processes together. A batch may span
    epochs: where the global batch does not divide the source, an epoch ends within a batch.

    Args:
      source: what to read; batches are read ahead by a few threads.
      batch_size: B, of this process; the global batch is process_count times that.
      seed: in [0, 2**32); decides the order and the flips.
      flip: mirror every image with probability one half.
      process_index: in [0, process_count); each process gets a block of every global batch.
      process_count: number of processes that read in step.

    Returns:
      An iterator whose get_state() is a dict of ints, for set_state() of an iterator made with the
      same arguments. It reads ahead in threads until its close().

    Raises:
      UserError: batch_size is below 1, or flip is asked of a source without images, or of latents.
    """
    if batch_size < 1:
        raise UserError(f"batch size is {batch_size}: it must be at least 1")
    if flip and len(source.shape) != 3:
        raise UserError(f"data.flip needs images, and {source.name!r} has none: set it to False")
    if flip and source.latent:
        raise UserError(
            "data.flip can't mirror latents: set it to False, and encode the images both ways by "
            "guided-distill encode --flip"
        )
    shard = _Shard(batch_size=batch_size, index=process_index, count=process_count)
    permutation = functools.lru_cache(maxsize=2)(
        lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(source))
    )

    def read(step: int) -> Examples:
        epoch, position = np.divmod(shard.positions(step), len(source))
        indices = np.concatenate(
            [permutation(e)[position[epoch == e]] for e in range(epoch[0], epoch[-1] + 1)]
        )
        return source.read(indices)

    steps = grain.MapDataset.range(sys.maxsize // shard.global_size - 1)
    dataset = steps.seed(seed).map(read)
    if flip:
        dataset = dataset.random_map(_RandomFlip(shard))
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    return iter(dataset.to_iter_dataset(options))


@dataclass(frozen=True)
class _Shard:
    """This process's part of every global batch: the index-th of `count` blocks."""

    batch_size: int
    index: int
    count: int

    @property
    def global_size(self) -> int:
        return self.batch_size * self.count

    @property
    def block(self) -> slice:
        return slice(self.index * self.batch_size, (self.index + 1) * self.batch_size)

    def positions(self, step: int) -> np.ndarray:
        """Places [B] in the endless stream of examples, ascending."""
        return step * self.global_size + np.arange(self.global_size)[self.block]


@dataclass(frozen=True)
class _RandomFlip(grain.transforms.RandomMap):
    """Mirrors images [B, H, W, C] in place; the draws are those of the global batch."""

    shard: _Shard

    def random_map(self, element: Examples, rng: np.random.Generator) -> Examples:
        draws = rng.random(self.shard.global_size)[self.shard.block]
        chosen = draws < 0.5
        images = element["image"]
        images[chosen] = images[chosen, :, ::-1]
        return element
