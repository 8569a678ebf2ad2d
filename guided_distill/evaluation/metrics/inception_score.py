"""Inception Score (Salimans et al. 2016, arXiv:1606.03498): exp of E KL(p(y|x) || p(y))."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax, xlogy

from guided_distill.evaluation.metrics.metric import Metric, Samples

SPLITS = 10


def inception_score(logits: ArrayLike) -> float:
    """The score of logits [n, K], a number in [1, K], in float64.

    As in the literature, the predictions are cut into 10 equal consecutive splits (n if that is fewer),
    and the score is the mean of the splits' scores. A split of m samples can't score above m, so few
    samples score low.
    """
    logits = np.asarray(logits)
    splits = min(SPLITS, len(logits))
    ends = -(-len(logits) * np.arange(splits + 1) // splits)
    return float(np.mean([_split_score(logits[i:j]) for i, j in itertools.pairwise(ends)]))


def _split_score(logits: np.ndarray) -> float:
    log_p = log_softmax(logits.astype(np.float64), axis=1)
    p = np.exp(log_p)
    marginal = p.mean(axis=0)
    return float(np.exp((p * log_p).sum(axis=1).mean() - xlogy(marginal, marginal).sum()))


@dataclass(frozen=True, kw_only=True)
class ClassScore(Metric):
    """inception_score: that of the extractor's logits; None if it has no classes."""

    inception_score: float | None = field(default=None, metadata={"title": "class score"})

    @classmethod
    def of(cls, samples: Samples) -> Self:
        """The score of the samples."""
        if not samples.logits.shape[1]:
            return cls()
        return cls(inception_score=inception_score(samples.logits))
