"""The feature extractor of an evaluation, which maps samples to features and class logits."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from guided_distill.data.pixels import from_uint8, to_uint8
from guided_distill.training.mesh import data_mesh, replicated, split_batch
from guided_distill.training.processes import on_all_processes, to_host

Apply = Callable[..., tuple[jax.Array, jax.Array]]
"""f(params, samples [B, ...]) -> (features [B, D], logits [B, K])."""

IN_FLIGHT = 2
"""The number of batches on the devices: one is computed while the next is prepared."""


@dataclass(frozen=True, eq=False)
class Extractor:
    """A fixed network that maps samples to features and logits.

    Images are rounded to 8 bits first, as in an image file: each value becomes from_uint8(to_uint8(x)),
    the nearest of the 256 levels (`data/pixels.py`). Points are left unchanged.

    name: recorded with results; the same name means comparable numbers. width: D. own_classes: whether
    the logits are of the data's own classes, so that they show whether a sample has the class that it was
    drawn for. batch_size: the number of samples per call of the network.
    """

    name: str
    width: int
    own_classes: bool
    apply: Apply
    params: Any
    batch_size: int
    mesh: Mesh = field(default_factory=data_mesh)

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Samples [n, ...], images in [-1, 1] -> (features [n, D], logits [n, K]), float32.

        The batch size is fixed and batches are split over the devices, so that the network is compiled
        once; a sample's features depend on that sample only.
        """
        batch_size = -(-self.batch_size // self.mesh.size) * self.mesh.size
        done, running = [], deque[tuple[jax.Array, jax.Array]]()
        for start in range(0, len(samples), batch_size):
            batch = _pad(_rounded(samples[start : start + batch_size]), batch_size)
            batch = on_all_processes(batch, split_batch(self.mesh))
            running.append(self._run(self._placed, batch))
            if len(running) == IN_FLIGHT:
                done.append([to_host(each) for each in running.popleft()])
        done += [[to_host(each) for each in outputs] for outputs in running]
        features, logits = (
            np.concatenate(parts)[: len(samples)] for parts in zip(*done, strict=True)
        )
        return features, logits

    @cached_property
    def _run(self) -> Apply:
        whole, split = replicated(self.mesh), split_batch(self.mesh)
        return jax.jit(self.apply, in_shardings=(whole, split), out_shardings=split)

    @cached_property
    def _placed(self) -> Any:
        return jax.device_put(self.params, replicated(self.mesh))


def _rounded(samples: np.ndarray) -> np.ndarray:
    return from_uint8(to_uint8(samples)) if samples.ndim == 4 else samples


def _pad(samples: np.ndarray, count: int) -> np.ndarray:
    missing = count - len(samples)
    return np.pad(samples, [(0, missing)] + [(0, 0)] * (samples.ndim - 1))
