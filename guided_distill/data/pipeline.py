"""Endless shuffled batches of a source, resumable at any step.

Examples are numbered along an endless stream in which epoch e holds every example of the source once,
permuted by (seed, e). Step k of all processes together takes the k-th block of that stream. The global
batch therefore depends only on its size, not on the number of processes, and an iterator's state is one
step number.
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
    """Iterates endlessly over shuffled batches of the source: "image" [B, *shape], "label" [B] etc.

    Every epoch visits each example exactly once, over all processes together. If the global batch
    doesn't divide the source, an epoch ends within a batch.

    Args:
      source: the examples; threads prefetch batches.
      batch_size: B, for this process; the global batch is process_count times that.
      seed: in [0, 2**32); determines the order and the flips.
      flip: whether to mirror each image with probability one half.
      process_index: in [0, process_count); each process reads a block of every global batch.
      process_count: number of processes that read the same steps.

    Returns:
      An iterator whose get_state() is a dict of ints, for set_state() of an iterator made with the
      same arguments. Its threads prefetch until its close().

    Raises:
      UserError: batch_size is below 1, or flip is set for latents or for data that aren't images.
    """
    if batch_size < 1:
        raise UserError(f"the batch size is {batch_size}: make it at least 1")
    if flip and len(source.shape) != 3:
        raise UserError(f"data.flip needs images, and {source.name!r} has none: set it to False")
    if flip and source.latent:
        raise UserError(
            "data.flip can't mirror latents: set it to False, and run guided-distill encode --flip to "
            "encode the mirror images too"
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
    """This process's part of every global batch: block `index` of `count` blocks."""

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
        """Positions [B] of a step's examples in the endless stream, ascending."""
        return step * self.global_size + np.arange(self.global_size)[self.block]


@dataclass(frozen=True)
class _RandomFlip(grain.transforms.RandomMap):
    """Mirrors random images of a batch [B, H, W, C] in place, by draws for the global batch."""

    shard: _Shard

    def random_map(self, element: Examples, rng: np.random.Generator) -> Examples:
        draws = rng.random(self.shard.global_size)[self.shard.block]
        chosen = draws < 0.5
        images = element["image"]
        images[chosen] = images[chosen, :, ::-1]
        return element
