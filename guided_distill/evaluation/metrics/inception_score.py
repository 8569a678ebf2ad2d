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

    As in the literature, the stream is cut into 10 equal consecutive splits (or `count` if that is
    fewer), and the score is the mean of the splits' scores, a number in [1, K]. A split of m samples
    can't score above m, so few samples score low.

    taken: the number of predictions so far. sums [splits, K]: sums of p(y|x). negative_entropies
    [splits]: sums of p(y|x) log p(y|x) over x and y.
    """

    count: int
    taken: int
    sums: np.ndarray
    negative_entropies: np.ndarray

    @classmethod
    def empty(cls, count: int, num_classes: int) -> InceptionScore:
        """The start of a stream of `count` predictions."""
        splits = min(SPLITS, count)
        return cls(count, 0, np.zeros((splits, num_classes)), np.zeros(splits))

    def accumulate(self, logits: ArrayLike) -> InceptionScore:
        """The score updated with the next predictions, logits [n, K]."""
        log_p = log_softmax(np.asarray(logits, np.float64), axis=1)
        p = np.exp(log_p)
        sums, negative_entropies = self.sums.copy(), self.negative_entropies.copy()
        indices = np.arange(self.taken, self.taken + len(p))
        split = indices * len(sums) // self.count
        np.add.at(sums, split, p)
        np.add.at(negative_entropies, split, (p * log_p).sum(axis=1))
        return InceptionScore(self.count, self.taken + len(p), sums, negative_entropies)

    def score(self) -> float:
        """The mean over splits. Raises UserError unless all `count` predictions were accumulated."""
        if self.taken != self.count or not self.count:
            raise UserError(
                f"an Inception Score of {self.count} samples was given {self.taken}: give all of them"
            )
        sizes = np.bincount(np.arange(self.count) * len(self.sums) // self.count)
        marginal = self.sums / sizes[:, None]
        divergence = self.negative_entropies / sizes - xlogy(marginal, marginal).sum(axis=1)
        return float(np.exp(divergence).mean())
