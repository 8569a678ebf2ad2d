"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991, eqs. 1-2).

A set of features stands for the manifold it was drawn from: the union of balls around its points,
each reaching to the k-th nearest other point of the set. Precision is the share of generated
points on the real manifold, recall the share of real points on the generated one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from guided_distill.errors import UserError
from guided_distill.evaluation.frechet import check_same_width, feature_matrix

_BLOCK_ROWS = 512


class PrecisionRecall(NamedTuple):
    """Both in [0, 1]: how real the samples are, and how much of the real variety they cover."""

    precision: float
    recall: float


@dataclass(frozen=True, eq=False)
class Manifold:
    """Features [N, D] and the squared radius [N] of the ball around each; made once, used often."""

    features: np.ndarray
    squared_radii: np.ndarray

    @classmethod
    def from_features(cls, features: ArrayLike, k: int = 3) -> Manifold:
        """The manifold of features [N, D], N > k, with balls up to the k-th nearest neighbour.

        Raises:
          UserError: `k` < 1, or see `feature_matrix`.
        """
        if k < 1:
            raise UserError(f"k must be at least 1, got {k}.")
        matrix = feature_matrix(features, min_rows=k + 1)
        squared_radii = np.empty(len(matrix))
        for rows, squared in _squared_distances(matrix, matrix):
            # A point is not its own neighbour, but a copy of it is.
            squared[np.arange(len(squared)), np.arange(rows.start, rows.stop)] = np.inf
            squared.partition(k - 1, axis=1)
            squared_radii[rows] = squared[:, k - 1]
        return cls(features=matrix, squared_radii=squared_radii)


def precision_recall(real: Manifold, generated: Manifold) -> PrecisionRecall:
    """Precision and recall of `generated` against `real`; the surface of a ball belongs to it.

    Raises:
      UserError: the feature dimensions differ.
    """
    check_same_width(real.features.shape[1], generated.features.shape[1])
    is_realistic = np.empty(len(generated.features), dtype=bool)
    is_covered = np.zeros(len(real.features), dtype=bool)
    for rows, squared in _squared_distances(generated.features, real.features):
        is_realistic[rows] = (squared <= real.squared_radii).any(axis=1)
        is_covered |= (squared <= generated.squared_radii[rows, None]).any(axis=0)
    return PrecisionRecall(precision=float(is_realistic.mean()), recall=float(is_covered.mean()))


def _squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (rows, |x[rows] - y|^2) block by block, so that memory grows with len(y) only."""
    # Distances do not depend on the origin, but the rounding of |x|^2 - 2 x.y + |y|^2 does.
    origin = y.mean(axis=0)
    y = y - origin
    y_norms = np.einsum("nd,nd->n", y, y)
    for start in range(0, len(x), _BLOCK_ROWS):
        rows = slice(start, min(start + _BLOCK_ROWS, len(x)))
        block = x[rows] - origin
        norms = np.einsum("nd,nd->n", block, block)[:, None] + y_norms
        squared = norms - 2 * block @ y.T
        # Equal points must be at distance zero, or a ball of radius zero misses its own centre.
        squared[squared < 1e-12 * norms] = 0.0
        yield rows, squared
