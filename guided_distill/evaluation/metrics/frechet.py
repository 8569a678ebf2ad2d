"""Fréchet distance between two sets of features (Heusel et al. 2017, arXiv:1706.08500, eq. 6).

With Inception features this is FID. Everything runs in float64. The trace of the matrix square root
comes from a symmetric eigenproblem: unlike a general matrix square root, it stays real for the
rank-deficient covariances that arise from fewer samples than dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from guided_distill.errors import UserError
from guided_distill.evaluation.metrics.metric import Metric, Samples


def feature_matrix(features: ArrayLike, *, min_rows: int) -> np.ndarray:
    """`features` as a finite float64 matrix [N, D] of at least `min_rows` rows.

    Raises:
      UserError: the array is not a matrix, holds too few rows, or is not finite.
    """
    matrix = np.asarray(features, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise UserError(f"features must have shape [N, D] with D > 0, got {matrix.shape}.")
    if len(matrix) < min_rows:
        raise UserError(
            f"features must hold at least {min_rows} rows, got {len(matrix)}; use more samples."
        )
    if not np.isfinite(matrix).all():
        raise UserError("features hold NaN or infinity; check the samples they were computed from.")
    return matrix


def check_same_width(width: int, other: int) -> None:
    """Raise UserError unless both feature sets have the same dimension D."""
    if width != other:
        raise UserError(
            f"features to compare must have the same dimension, got {width} and {other}; "
            "compute both with the same extractor."
        )


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean [D] and unbiased covariance [D, D] of `count` feature vectors, in float64.

    The covariance of fewer than two vectors is stored as zero, which makes `empty` the neutral
    element of `merge`.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int

    @classmethod
    def empty(cls, width: int) -> FeatureStatistics:
        """Statistics of no features of dimension `width`: the start of a stream."""
        return cls(mean=np.zeros(width), covariance=np.zeros((width, width)), count=0)

    @classmethod
    def from_features(cls, features: ArrayLike) -> FeatureStatistics:
        """Statistics of features [N, D], N >= 1.

        Raises:
          UserError: see `feature_matrix`.
        """
        matrix = feature_matrix(features, min_rows=1)
        mean = matrix.mean(axis=0)
        centred = matrix - mean
        covariance = centred.T @ centred / max(len(matrix) - 1, 1)
        return cls(mean=mean, covariance=covariance, count=len(matrix))

    def accumulate(self, features: ArrayLike) -> FeatureStatistics:
        """These statistics updated with a batch of features [N, D].

        Raises:
          UserError: see `feature_matrix` and `merge`.
        """
        return self.merge(FeatureStatistics.from_features(features))

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Statistics of both sets together, as if computed at once (Chan et al. 1979).

        Centred sums are combined instead of raw second moments, whose difference would lose the
        digits of a covariance that is small beside the mean.

        Raises:
          UserError: the feature dimensions differ.
        """
        check_same_width(len(self.mean), len(other.mean))
        count = self.count + other.count
        if count == 0:
            return self
        shift = other.mean - self.mean
        other_share = other.count / count
        scatter = (
            (self.count - 1) * self.covariance
            + (other.count - 1) * other.covariance
            + self.count * other_share * np.outer(shift, shift)
        )
        return FeatureStatistics(
            mean=self.mean + other_share * shift,
            covariance=scatter / max(count - 1, 1),
            count=count,
        )


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|mean_a - mean_b|^2 + Tr(A + B - 2 (A^1/2 B A^1/2)^1/2), a number >= 0.

    The trace of the root is the sum of the roots of the eigenvalues of A^1/2 B A^1/2, formed in
    the eigenbasis of A. Rounding leaves an absolute error of up to about D * 1e-8 times the
    largest variance.

    Raises:
      UserError: the feature dimensions differ, or a set holds fewer than two rows.
    """
    check_same_width(len(a.mean), len(b.mean))
    if min(a.count, b.count) < 2:
        raise UserError(
            f"a Fréchet distance needs at least 2 rows of features in each set, got {a.count} "
            f"and {b.count}; use more samples."
        )
    variances, directions = np.linalg.eigh(a.covariance)
    root = directions * np.sqrt(np.maximum(variances, 0.0))
    cross_variances = np.linalg.eigvalsh(root.T @ b.covariance @ root)
    cross_deviation = np.sqrt(np.maximum(cross_variances, 0.0)).sum()
    mean_gap = a.mean - b.mean
    distance = (
        mean_gap @ mean_gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross_deviation
    )
    # A squared Wasserstein distance is never negative: values below zero are rounding errors.
    return max(float(distance), 0.0)


def frechet_standard_error(
    features: np.ndarray, own: FeatureStatistics, other: FeatureStatistics
) -> float | None:
    """The standard error of `frechet_distance(own, other)` that sampling `features` [n, D] causes.

    By the delta method: to first order a sample x changes the distance by its influence,
    2 (m - m') . (x - m) + (x - m)^T (I - T) (x - m), where T is the matrix of the optimal map between the
    two normal distributions. The bias of the distance, which falls as 1/n, isn't part of it. None if n
    doesn't exceed D, for which the covariance has no inverse.
    """
    count, width = features.shape
    if count <= width:
        return None
    variances, directions = np.linalg.eigh(own.covariance)
    kept = variances > variances[-1] * width * np.finfo(np.float64).eps
    roots, directions = np.sqrt(variances[kept]), directions[:, kept]
    cross = roots[:, None] * (directions.T @ other.covariance @ directions) * roots
    cross_variances, turned = np.linalg.eigh(cross)
    transport = (turned * np.sqrt(np.maximum(cross_variances, 0.0))) @ turned.T
    transport /= roots[:, None] * roots
    centred = features - own.mean
    inside = centred @ directions
    influence = 2 * centred @ (own.mean - other.mean) + np.square(centred).sum(axis=1)
    influence -= np.einsum("ni,ij,nj->n", inside, transport, inside, optimize=True)
    return float(influence.std() / np.sqrt(count))


@dataclass(frozen=True, kw_only=True)
class Frechet(Metric):
    """fd: Fréchet distance to the reference. fd_se: its standard error, for the given reference."""

    fd: float = field(metadata={"title": "Fréchet distance"})
    fd_se: float | None = None

    @classmethod
    def of(cls, samples: Samples) -> Self:
        """The distance of the samples to the reference."""
        own, other = samples.statistics, samples.reference.statistics
        return cls(
            fd=frechet_distance(other, own),
            fd_se=frechet_standard_error(samples.features, own, other),
        )
