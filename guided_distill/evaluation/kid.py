"""Kernel distance between two sets of features: KID (Bińkowski et al. 2018, arXiv:1801.01401)."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from guided_distill.errors import UserError
from guided_distill.evaluation.frechet import check_same_width, feature_matrix

_BLOCK_ROWS = 512


class KernelDistance(NamedTuple):
    """mean: the distance; std: the deviation of the subsets' estimates, which papers write behind a +-.

    The standard error of the mean is about std / sqrt(num_subsets) at fixed features. std is None where
    no subsets were drawn.
    """

    mean: float
    std: float | None


def kernel_distance(
    a: ArrayLike,
    b: ArrayLike,
    *,
    subset_size: int = 1000,
    num_subsets: int = 100,
    seed: int = 0,
) -> KernelDistance:
    """Unbiased squared MMD between features a [N, D] and b [M, D], kernel (x.y / D + 1)^3.

    One rule for every size: a set of at most `subset_size` rows is used whole, a larger one is
    represented by `subset_size` of its rows drawn without replacement. If any set is drawn from,
    the result is the mean over `num_subsets` draws (set by `seed` and the order of the rows);
    if none is, it is the one estimate from all rows. Either way it is unbiased, and therefore
    negative at times when the distributions agree. 100 subsets of 1,000 are usual.

    Raises:
      UserError: the dimensions differ, a set holds fewer than two rows, a value is not finite,
        or `subset_size` < 2 or `num_subsets` < 1.
    """
    a, b = np.asarray(a), np.asarray(b)
    for each in (a, b):
        feature_matrix(each[:2], min_rows=2)
    check_same_width(a.shape[1], b.shape[1])
    if subset_size < 2:
        raise UserError(f"subset_size must be at least 2, got {subset_size}.")
    if num_subsets < 1:
        raise UserError(f"num_subsets must be at least 1, got {num_subsets}.")
    if max(len(a), len(b)) <= subset_size:
        whole = (feature_matrix(each, min_rows=2) for each in (a, b))
        return KernelDistance(_squared_mmd(*whole), None)
    rng = np.random.default_rng(seed)
    estimates = [
        _squared_mmd(_subset(a, subset_size, rng), _subset(b, subset_size, rng))
        for _ in range(num_subsets)
    ]
    return KernelDistance(float(np.mean(estimates)), float(np.std(estimates)))


def _subset(features: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    # In float64, all features would take much memory.
    if len(features) > size:
        features = features[rng.choice(len(features), size=size, replace=False)]
    return feature_matrix(features, min_rows=2)


def _squared_mmd(a: np.ndarray, b: np.ndarray) -> float:
    return (
        _mean_kernel_of_pairs(a)
        + _mean_kernel_of_pairs(b)
        - 2 * _kernel_sum(a, b) / len(a) / len(b)
    )


def _mean_kernel_of_pairs(x: np.ndarray) -> float:
    """Mean kernel over ordered pairs of different rows."""
    of_itself = np.sum((np.mean(x * x, axis=1) + 1) ** 3)
    return float(_kernel_sum(x, x) - of_itself) / len(x) / (len(x) - 1)


def _kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    total = 0.0
    scaled = x / x.shape[1]
    for start in range(0, len(x), _BLOCK_ROWS):
        base = scaled[start : start + _BLOCK_ROWS] @ y.T
        base += 1
        total += float(np.vdot(base * base, base))
    return total
