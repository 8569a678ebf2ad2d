"""How well images show what their captions say, by features of images and embeddings of sentences.

A ridge regression, fitted on training images and their captions, guesses the embedding of an image's
caption from the image's features. Samples are then held against captions that it never saw: is the
guess nearest to the caption which the sample was made for? With the features of `lite0.py` and the
embeddings of `text/minilm.py` it is called MiniLM-Lite0 alignment. It stands in for a CLIP score where
there are no CLIP weights, and isn't comparable with one; with them, see `clip.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from guided_distill.errors import UserError
from guided_distill.evaluation.metrics.frechet import check_same_width, feature_matrix

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
        """From images' features [N, D] to the embeddings [N, E] of their captions.

        Raises UserError unless both are finite matrices of as many rows.
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
        """Features [n, D] -> guessed embeddings [n, E] less their mean, of length 1."""
        x = feature_matrix(features, min_rows=1)
        check_same_width(x.shape[1], len(self.feature_mean))
        return _unit((x - self.feature_mean) @ self.weights)

    def align(self, features: ArrayLike, embeddings: ArrayLike, captions: np.ndarray) -> Alignment:
        """Of samples with the captions that they were made for.

        Args:
          features: of samples, [n, D].
          embeddings: of the distinct captions to choose among, [M, E].
          captions: which caption each sample was made for, integers [n] in [0, M).

        Raises:
          UserError: they don't fit each other, or aren't finite.
        """
        guesses = self.directions(features)
        y = feature_matrix(embeddings, min_rows=1)
        check_same_width(y.shape[1], len(self.embedding_mean))
        if captions.shape != (len(guesses),) or captions.min() < 0 or captions.max() >= len(y):
            raise UserError(
                f"each of {len(guesses)} samples needs the number of its caption, below {len(y)}."
            )
        return retrieval(guesses, _unit(y - self.embedding_mean), captions)


@dataclass(frozen=True)
class Alignment:
    """Of samples with their captions: higher is better.

    recall_at_1, recall_at_10: share of samples whose caption is the nearest of all, or one of the ten.
    cosine: of sample and caption; by a regression both are less the training captions' mean, so that it
    is 0 for unrelated ones.
    """

    recall_at_1: float
    recall_at_10: float
    cosine: float


def retrieval(guesses: np.ndarray, embeddings: np.ndarray, captions: np.ndarray) -> Alignment:
    """Of samples' vectors [n, E] with captions' [M, E], all of length 1; captions [n]: whose is whose."""
    cosines = guesses @ embeddings.T
    own = cosines[np.arange(len(cosines)), captions]
    nearer = (cosines > own[:, None]).sum(axis=1)
    return Alignment(
        recall_at_1=float((nearer < 1).mean()),
        recall_at_10=float((nearer < TOP).mean()),
        cosine=float(own.mean()),
    )


def _unit(vectors: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)
