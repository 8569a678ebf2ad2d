"""Inception Score (Salimans et al. 2016, arXiv:1606.03498): exp of E KL(p(y|x) || p(y))."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax, xlogy

from guided_distill.errors import UserError

SPLITS = 10


@dataclass(frozen=True, eq=False)
class InceptionScore:
    """The score of a stream of `count` predictions over K classes, in float64.

    As in the literature the stream is cut into equal consecutive splits, 10 of them or `count` if
    that is fewer, each is scored by itself, and the mean is the score: a number in [1, K]. A split of m
    samples can't score more than m, so that few samples score low.

    taken: predictions so far. sums [splits, K]: of p(y|x). negative_entropies [splits]: of the sums
    over y of p(y|x) log p(y|x).
    """

    count: int
    taken: int
    sums: np.ndarray
    negative_entropies: np.ndarray

    @classmethod
    def empty(cls, count: int, num_classes: int) -> InceptionScore:
        """Where a stream of `count` predictions starts."""
        splits = min(SPLITS, count)
        return cls(count, 0, np.zeros((splits, num_classes)), np.zeros(splits))

    def accumulate(self, logits: ArrayLike) -> InceptionScore:
        """With the next predictions, logits [n, K], taken in."""
        log_p = log_softmax(np.asarray(logits, np.float64), axis=1)
        p = np.exp(log_p)
        sums, negative_entropies = self.sums.copy(), self.negative_entropies.copy()
        indices = np.arange(self.taken, self.taken + len(p))
        split = indices * len(sums) // self.count
        np.add.at(sums, split, p)
        np.add.at(negative_entropies, split, (p * log_p).sum(axis=1))
        return InceptionScore(self.count, self.taken + len(p), sums, negative_entropies)

    def score(self) -> float:
        """The mean over splits. Raises UserError unless all `count` predictions were taken in."""
        if self.taken != self.count or not self.count:
            raise UserError(
                f"an Inception Score of {self.count} samples was given {self.taken}: give them all"
            )
        sizes = np.bincount(np.arange(self.count) * len(self.sums) // self.count)
        marginal = self.sums / sizes[:, None]
        divergence = self.negative_entropies / sizes - xlogy(marginal, marginal).sum(axis=1)
        return float(np.exp(divergence).mean())
