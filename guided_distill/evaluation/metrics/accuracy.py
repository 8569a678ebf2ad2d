"""Accuracy: how often a classifier of the data recognizes what a sample was drawn for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from guided_distill.evaluation.metrics.metric import Metric, Samples


@dataclass(frozen=True, kw_only=True)
class Accuracy(Metric):
    """accuracy: the share of samples classified as their label, in [0, 1].

    None unless the extractor's classes are the data's own.
    """

    accuracy: float | None = field(default=None, metadata={"title": "class accuracy"})

    @classmethod
    def of(cls, samples: Samples) -> Self:
        """The accuracy on the samples."""
        if not samples.own_classes:
            return cls()
        return cls(accuracy=float((samples.logits.argmax(axis=1) == samples.labels).mean()))
