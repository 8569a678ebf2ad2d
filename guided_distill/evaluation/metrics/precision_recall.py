"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991, eqs. 1-2).

A set of features represents the manifold it was drawn from: the union of balls around its points, each
of which reaches to the k-th nearest other point of the set. Precision is the share of generated points on
the real manifold, recall the share of real points on the generated one.

Distances between all pairs are computed on the devices, in float32 as |x|^2 - 2 x.y + |y|^2. Where
rounding could change the result, for the nearest few points and for pairs close to a ball's surface,
|x - y|^2 is computed again in float64. The results are those of exact distances, unless the error of
float32 is far larger than observed (see _DOUBT).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from guided_distill.errors import UserError
from guided_distill.evaluation.metrics.frechet import check_same_width, feature_matrix
from guided_distill.evaluation.metrics.metric import Metric, Samples
from guided_distill.training.mesh import data_mesh, replicated, split_batch
from guided_distill.training.processes import on_all_processes

_BLOCK_ROWS = 512
_SPARE_NEIGHBOURS = 6
MAX_SAMPLES = 10_000
FEWEST_SAMPLES = 4
"""A ball reaches to the third nearest of the other samples."""

_DOUBT = 1e-5
"""The assumed maximum error of a float32 distance, as a share of |x|^2 + |y|^2.

For normal features of up to 10,000 dimensions the error is below 3e-7; in the worst case, if all
roundings add up, it is larger.
"""


class PrecisionRecall(NamedTuple):
    """Precision (how realistic samples are) and recall (how much of the data they cover), in [0, 1]."""

    precision: float
    recall: float


@dataclass(frozen=True, eq=False)
class Manifold:
    """Features [N, D] and the squared radius [N] of the ball around each; computed once, used often."""

    features: np.ndarray
    squared_radii: np.ndarray

    @classmethod
    def from_features(cls, features: ArrayLike, k: int = 3, mesh: Mesh | None = None) -> Manifold:
        """The manifold of features [N, D], N > k, with balls that reach to the k-th nearest neighbour.

        mesh: the devices to use; by default, all devices of this process.

        Raises:
          UserError: `k` < 1, or see `feature_matrix`.
        """
        if k < 1:
            raise UserError(f"k must be at least 1, got {k}.")
        mesh = mesh or data_mesh(jax.local_devices())
        matrix = feature_matrix(features, min_rows=k + 1)
        points = _centred(matrix, matrix)
        nearest = _compiled_nearest(min(k + _SPARE_NEIGHBOURS, len(matrix)), mesh)
        placed = jax.device_put(points, replicated(mesh))
        squared_radii = np.empty(len(matrix))
        for rows, block, own in _blocks(points, np.arange(len(matrix)), mesh):
            least, indices = (np.asarray(each)[: len(rows)] for each in nearest(block, own, placed))
            exact = _squared(matrix[rows, None], matrix[indices[:, :-1]])
            squared_radii[rows] = np.partition(exact, k - 1)[:, k - 1]
            # A point that was left out may be nearer than one of the candidates.
            for row in rows[squared_radii[rows] > np.maximum(least[:, -1], 0)]:
                others = _squared(matrix[row], np.delete(matrix, row, axis=0))
                squared_radii[row] = np.partition(others, k - 1)[k - 1]
        return cls(features=matrix, squared_radii=squared_radii)


def precision_recall(
    real: Manifold, generated: Manifold, mesh: Mesh | None = None
) -> PrecisionRecall:
    """Precision and recall of `generated` against `real`; a ball includes its surface.

    mesh: the devices to use; by default, all devices of this process.

    Raises:
      UserError: the feature dimensions differ.
    """
    check_same_width(real.features.shape[1], generated.features.shape[1])
    mesh = mesh or data_mesh(jax.local_devices())
    inside = _compiled_inside(mesh)
    placed, radii = jax.device_put(
        (_centred(real.features, real.features), real.squared_radii.astype(np.float32)),
        replicated(mesh),
    )
    is_realistic = np.zeros(len(generated.features), dtype=bool)
    is_covered = np.zeros(len(real.features), dtype=bool)
    points = _centred(generated.features, real.features)
    for rows, block, own_radii in _blocks(points, generated.squared_radii, mesh):
        realistic, covered, doubtful = map(np.asarray, inside(block, own_radii, placed, radii))
        is_realistic[rows] = realistic[: len(rows)]
        is_covered |= covered
        row, column = np.nonzero(doubtful[: len(rows)])
        for start in range(0, len(row), _BLOCK_ROWS):
            one, other = rows[row[start:][:_BLOCK_ROWS]], column[start:][:_BLOCK_ROWS]
            squared = _squared(generated.features[one], real.features[other])
            is_realistic[one[squared <= real.squared_radii[other]]] = True
            is_covered[other[squared <= generated.squared_radii[one]]] = True
    return PrecisionRecall(precision=float(is_realistic.mean()), recall=float(is_covered.mean()))


@dataclass(frozen=True, kw_only=True)
class Nearness(Metric):
    """Precision and recall of the first 10,000 samples.

    Both are None for a reference without features, or if either set has fewer than FEWEST_SAMPLES.
    """

    precision: float | None = field(default=None, metadata={"title": "precision"})
    recall: float | None = field(default=None, metadata={"title": "recall"})

    @classmethod
    def of(cls, samples: Samples) -> Self:
        """Precision and recall of the samples against the reference."""
        real, features = samples.reference.features, samples.features[:MAX_SAMPLES]
        if real is None or min(len(real), len(features)) < FEWEST_SAMPLES:
            return cls()
        found = precision_recall(samples.reference.manifold, Manifold.from_features(features))
        return cls(precision=found.precision, recall=found.recall)


def _squared(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|x - y|^2 over the last axis; exactly zero for equal points."""
    return np.square(x - y).sum(axis=-1)


def _centred(x: np.ndarray, around: np.ndarray) -> np.ndarray:
    # Distances do not depend on the origin, but the rounding of |x|^2 - 2 x.y + |y|^2 does.
    return (x - around.mean(axis=0)).astype(np.float32)


def _blocks(
    x: np.ndarray, of_each: np.ndarray, mesh: Mesh
) -> Iterator[tuple[np.ndarray, Any, Any]]:
    """Yield (indices of rows, these rows of x, these rows of `of_each`), the last two padded to one size.

    In padding rows `of_each` is -1, which is neither the index of a point nor a squared radius.
    """
    size = _BLOCK_ROWS * mesh.size
    for start in range(0, len(x), size):
        rows = np.arange(start, min(start + size, len(x)))
        missing = size - len(rows)
        block = np.pad(x[rows], [(0, missing), (0, 0)])
        of_rows = np.pad(of_each[rows].astype(np.float32), (0, missing), constant_values=-1)
        yield rows, *on_all_processes((block, of_rows), split_batch(mesh))


def _approximate(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Squared distances [B, N] from x [B, D] to y [N, D], and bounds on their errors."""
    norms = jnp.sum(x * x, axis=1)[:, None] + jnp.sum(y * y, axis=1)[None]
    return norms - 2 * jnp.matmul(x, y.T, precision="highest"), _DOUBT * norms


@functools.cache
def _compiled_nearest(count: int, mesh: Mesh) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """f(x [B, D], its indices in y [B], y [N, D]) -> (least [B, count], indices [B, count]).

    The indices are those of the points of y, other than x itself, that may be nearest. least: the lower
    bounds of the squared distances to them, in ascending order.
    """

    def nearest(x: jax.Array, own: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        squared, doubt = _approximate(x, y)
        is_self = own[:, None] == jnp.arange(len(y))[None]
        least = jnp.where(is_self, jnp.inf, squared - doubt)
        # Use all of top_k's output: XLA sorts whole rows if only a part of it is used.
        negated, indices = jax.lax.top_k(-least, count)
        return -negated, indices

    whole, split = replicated(mesh), split_batch(mesh)
    return jax.jit(nearest, in_shardings=(split, split, whole), out_shardings=split)


@functools.cache
def _compiled_inside(mesh: Mesh) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """f(x [B, D], its radii [B], y [N, D], its radii [N]) -> (realistic [B], covered [N], doubtful).

    realistic: which x certainly lie in a ball around some y. covered: which y certainly lie in a ball
    around some x of the block. doubtful [B, N]: pairs that may change either result.
    """

    def inside(
        x: jax.Array, x_radii: jax.Array, y: jax.Array, y_radii: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        squared, doubt = _approximate(x, y)
        from_y, from_x = squared - y_radii[None], squared - x_radii[:, None]
        realistic = jnp.any(from_y < -doubt, axis=1)
        covered = jnp.any(from_x < -doubt, axis=0)
        doubtful = (jnp.abs(from_y) <= doubt) & ~realistic[:, None]
        doubtful |= (jnp.abs(from_x) <= doubt) & ~covered[None]
        return realistic, covered, doubtful

    whole, split = replicated(mesh), split_batch(mesh)
    return jax.jit(
        inside, in_shardings=(split, split, whole, whole), out_shardings=(split, whole, split)
    )
