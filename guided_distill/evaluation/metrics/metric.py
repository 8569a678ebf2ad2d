"""What a metric is: columns of `results.csv`, computed from samples."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

if TYPE_CHECKING:
    from guided_distill.evaluation.captions import Align
    from guided_distill.evaluation.metrics.frechet import FeatureStatistics
    from guided_distill.evaluation.reference import Reference
    from guided_distill.evaluation.teacher import TeacherSamples


@dataclass(frozen=True, eq=False)
class Samples:
    """What the metrics of n samples can use.

    features [n, D], logits [n, K]: the extractor's outputs; K is 0 if it has no classes. statistics: of
    the features. labels: the classes [n] that the samples were drawn for. own_classes: whether the logits
    are of the data's own classes. captions: the texts [n] that the samples were drawn for; None without
    text. align: the measure of alignment with them; None if there is none. teacher: samples of the
    teacher to compare with; None if they weren't asked for. squared_errors: the mean squared difference
    [n] of each sample from the teacher's of the same noise; NaN where it isn't known.
    """

    features: np.ndarray
    logits: np.ndarray
    statistics: FeatureStatistics
    labels: np.ndarray
    own_classes: bool
    reference: Reference
    squared_errors: np.ndarray
    captions: np.ndarray | None = None
    align: Align | None = None
    teacher: TeacherSamples | None = None


@dataclass(frozen=True, kw_only=True)
class Metric(abc.ABC):
    """The base class of metrics; a subclass is a dataclass of columns, and a line registers it.

    A column that doesn't apply to the samples is None. A field's metadata holds its "title". The column
    NAME_se is the standard error of NAME, which figures show as a band.
    """

    @classmethod
    @abc.abstractmethod
    def of(cls, samples: Samples) -> Self:
        """The metric of these samples."""
