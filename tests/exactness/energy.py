"""Energy distance between two sets of low-dimensional samples (Székely and Rizzo 2013)."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.distance import cdist

from guided_distill.evaluation.metrics.frechet import check_same_width, feature_matrix

_BLOCK_ROWS = 512


def energy_distance(a: ArrayLike, b: ArrayLike) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| for samples a [N, D] and b [M, D], Euclidean norm.

    Each mean runs over pairs of different samples, so the estimate is unbiased, and therefore
    negative at times when the distributions agree. It grows in proportion to the unit of the
    samples. Time is O((N + M)^2 D).

    Raises:
      UserError: the dimensions differ, a set holds fewer than two rows, or a value is not finite.
    """
    a = feature_matrix(a, min_rows=2)
    b = feature_matrix(b, min_rows=2)
    check_same_width(a.shape[1], b.shape[1])
    return (
        2 * _distance_sum(a, b) / len(a) / len(b)
        - _distance_sum(a, a) / len(a) / (len(a) - 1)
        - _distance_sum(b, b) / len(b) / (len(b) - 1)
    )


def _distance_sum(x: np.ndarray, y: np.ndarray) -> float:
    blocks = range(0, len(x), _BLOCK_ROWS)
    return sum(float(cdist(x[start : start + _BLOCK_ROWS], y).sum()) for start in blocks)
