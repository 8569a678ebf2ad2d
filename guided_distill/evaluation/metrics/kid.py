"""Kernel distance between two sets of features: KID (Bińkowski et al. 2018, arXiv:1801.01401)."""

from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike

from guided_distill.errors import UserError
from guided_distill.evaluation.metrics.frechet import check_same_width, feature_matrix
from guided_distill.evaluation.metrics.metric import Metric, Samples

_BLOCK_ROWS = 512


class KernelDistance(NamedTuple):
    """mean: the distance. std: the standard deviation over subsets, which papers report after a +-.

    The standard error of the mean is about std / sqrt(num_subsets) for fixed features. std is None if no
    subsets were drawn.
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
    """Unbiased squared MMD between features a [N, D] and b [M, D], with the kernel (x.y / D + 1)^3.

    A set of at most `subset_size` rows is used whole; from a larger one, `subset_size` rows are drawn
    without replacement. If rows of either set are drawn, the result is the mean over `num_subsets` draws
    (which depend on `seed` and the order of the rows); otherwise it is the single estimate from all rows.
    Both are unbiased, and therefore sometimes negative if the distributions agree. 100 subsets of 1,000
    are usual.

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
        (whole,) = _squared_mmds(a, b, _all_rows(a), _all_rows(b))
        return KernelDistance(float(whole), None)
    rng = np.random.default_rng(seed)
    draws = [
        (_subset(len(a), subset_size, rng), _subset(len(b), subset_size, rng))
        for _ in range(num_subsets)
    ]
    estimates = _squared_mmds(a, b, *map(np.stack, zip(*draws, strict=True)))
    return KernelDistance(float(np.mean(estimates)), float(np.std(estimates)))


def _subset(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    return rng.choice(count, size=size, replace=False) if count > size else np.arange(count)


def _all_rows(x: np.ndarray) -> np.ndarray:
    return np.arange(len(x))[None]


def _squared_mmds(a: np.ndarray, b: np.ndarray, of_a: np.ndarray, of_b: np.ndarray) -> np.ndarray:
    """The estimates [K] from rows of_a [K, n] of a and rows of_b [K, m] of b."""
    between = _kernel_sums(a, b, of_a, of_b) / of_a.shape[1] / of_b.shape[1]
    return _mean_kernels_of_pairs(a, of_a) + _mean_kernels_of_pairs(b, of_b) - 2 * between


def _mean_kernels_of_pairs(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The mean kernel over ordered pairs of different rows, for each set of rows [K, n]."""
    count = rows.shape[1]
    squares = np.einsum("nd,nd->n", x, x, dtype=np.float64)  # Without a float64 copy of x.
    with_themselves = (squares / x.shape[1] + 1) ** 3
    sums = _kernel_sums(x, x, rows, rows) - np.sum(with_themselves[rows], axis=1)
    return sums / count / (count - 1)


def _kernel_sums(x: np.ndarray, y: np.ndarray, of_x: np.ndarray, of_y: np.ndarray) -> np.ndarray:
    """Sums [K] of the kernel over all pairs of rows of_x [K, n] of x and rows of_y [K, m] of y."""
    if len(x) * len(y) > of_x.size * of_y.shape[1]:
        # Large sets have more pairs than all subsets together, and need much memory in float64.
        parts = ((x[i], y[j]) for i, j in zip(of_x, of_y, strict=True))
        return np.concatenate([_kernel_sums(i, j, _all_rows(i), _all_rows(j)) for i, j in parts])
    if len(x) < len(y):
        x, y, of_x, of_y = y, x, of_y, of_x
    in_x, in_y = _membership(of_x, len(x)), _membership(of_y, len(y))
    totals = np.zeros(len(of_x))
    y = feature_matrix(y, min_rows=2) / y.shape[1]
    for start in range(0, len(x), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        # The larger set is converted to float64 in blocks, to save memory.
        base = feature_matrix(x[block], min_rows=1) @ y.T
        base += 1
        totals += np.sum(in_x[:, block] @ (base * base * base) * in_y, axis=1)
    return totals


def _membership(rows: np.ndarray, count: int) -> np.ndarray:
    """Whether each set of rows [K, n] holds each of `count` rows: 1 or 0, [K, count]."""
    found = np.zeros((len(rows), count))
    np.put_along_axis(found, rows, 1.0, axis=1)
    return found


@dataclass(frozen=True, kw_only=True)
class Kernel(Metric):
    """kid: kernel distance to the reference's features. kid_std: its deviation over subsets.

    Both are None for a reference without features. kid is unbiased, so it may be below 0.
    """

    kid: float | None = field(default=None, metadata={"title": "kernel distance"})
    kid_std: float | None = None

    @classmethod
    def of(cls, samples: Samples) -> Self:
        """The distance of the samples to the reference."""
        if samples.reference.features is None:
            return cls()
        found = kernel_distance(samples.reference.features, samples.features)
        return cls(kid=found.mean, kid_std=found.std)
