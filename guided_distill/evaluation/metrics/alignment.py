"""Alignment of images with their captions, from features of images and embeddings of sentences.

A ridge regression, fitted on training images and their captions, predicts the embedding of an image's
caption from the image's features. Samples are then compared with captions that it was not fitted on: is
the prediction nearest to the caption that the sample was drawn for? With the features of `lite0.py` and
the embeddings of `text/minilm.py` this is called MiniLM-Lite0 alignment. It replaces a CLIP score, with
which it isn't comparable, if there are no CLIP weights; for those, see `clip.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from guided_distill.errors import UserError
from guided_distill.evaluation.metrics.frechet import check_same_width, feature_matrix
from guided_distill.evaluation.metrics.metric import Metric, Samples

RIDGE = 300.0
"""The penalty on the squared weights, chosen for Lite0's features."""

TOP = 10


@dataclass(frozen=True, eq=False)
class CaptionGuess:
    """The regression: feature_mean [D], embedding_mean [E], weights [D, E]."""

    feature_mean: np.ndarray
    embedding_mean: np.ndarray
    weights: np.ndarray

    @classmethod
    def fit(
        cls, features: ArrayLike, embeddings: ArrayLike, *, ridge: float = RIDGE
    ) -> CaptionGuess:
        """Fit the regression from images' features [N, D] to the embeddings [N, E] of their captions.

        Raises UserError unless both are finite matrices with the same number of rows.
        """
        x = feature_matrix(features, min_rows=2)
        y = feature_matrix(embeddings, min_rows=2)
        if len(x) != len(y):
            raise UserError(
                f"there are features of {len(x)} images and embeddings of {len(y)} captions; give every "
                "image its caption."
            )
        feature_mean, embedding_mean = x.mean(axis=0), y.mean(axis=0)
        x, y = x - feature_mean, y - embedding_mean
        weights = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y)
        return cls(feature_mean, embedding_mean, weights)

    def directions(self, features: ArrayLike) -> np.ndarray:
        """Features [n, D] -> predicted embeddings [n, E] minus their mean, of length 1."""
        x = feature_matrix(features, min_rows=1)
        check_same_width(x.shape[1], len(self.feature_mean))
        return _unit((x - self.feature_mean) @ self.weights)

    def align(self, features: ArrayLike, embeddings: ArrayLike, captions: np.ndarray) -> Alignment:
        """The alignment of samples with the captions that they were drawn for.

        Args:
          features: features of the samples, [n, D].
          embeddings: embeddings of the distinct captions to choose from, [M, E].
          captions: the index of the caption that each sample was drawn for, integers [n] in [0, M).

        Raises:
          UserError: the shapes don't match, or values aren't finite.
        """
        guesses = self.directions(features)
        y = feature_matrix(embeddings, min_rows=1)
        check_same_width(y.shape[1], len(self.embedding_mean))
        if captions.shape != (len(guesses),) or captions.min() < 0 or captions.max() >= len(y):
            raise UserError(
                f"each of {len(guesses)} samples needs the index of its caption, from 0 to {len(y) - 1}."
            )
        return retrieval(guesses, _unit(y - self.embedding_mean), captions)


@dataclass(frozen=True)
class Alignment:
    """The alignment of samples with their captions: higher is better.

    recall_at_1, recall_at_10: share of samples whose caption is the nearest, or among the ten nearest.
    cosine: mean cosine between sample and caption; for the regression, the mean of the training captions
    is subtracted from both, so that it is 0 for unrelated ones.
    """

    recall_at_1: float
    recall_at_10: float
    cosine: float


def retrieval(guesses: np.ndarray, embeddings: np.ndarray, captions: np.ndarray) -> Alignment:
    """Alignment of vectors of samples [n, E] and of captions [M, E], all of length 1.

    captions: the index [n] of each sample's caption.
    """
    cosines = guesses @ embeddings.T
    own = cosines[np.arange(len(cosines)), captions]
    nearer = (cosines > own[:, None]).sum(axis=1)
    return Alignment(
        recall_at_1=float((nearer < 1).mean()),
        recall_at_10=float((nearer < TOP).mean()),
        cosine=float(own.mean()),
    )


@dataclass(frozen=True, kw_only=True)
class CaptionAlignment(Metric):
    """alignment, caption_recall: cosine, and recall at 10, of samples with their captions.

    With CLIP's features the cosine is the CLIP score. Both are None without captions.
    """

    alignment: float | None = field(default=None, metadata={"title": "alignment"})
    caption_recall: float | None = field(default=None, metadata={"title": "caption recall"})

    @classmethod
    def of(cls, samples: Samples) -> Self:
        """The alignment of the samples."""
        if samples.align is None or samples.captions is None:
            return cls()
        found = samples.align(samples.features, samples.captions)
        return cls(alignment=found.cosine, caption_recall=found.recall_at_10)


def _unit(vectors: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)
