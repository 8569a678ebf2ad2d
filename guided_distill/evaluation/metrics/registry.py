"""The metrics of an evaluation: the columns of `results.csv` that are measured."""

from dataclasses import dataclass

from guided_distill.evaluation.metrics.accuracy import Accuracy
from guided_distill.evaluation.metrics.alignment import CaptionAlignment
from guided_distill.evaluation.metrics.distillation import Distillation
from guided_distill.evaluation.metrics.frechet import Frechet
from guided_distill.evaluation.metrics.inception_score import ClassScore
from guided_distill.evaluation.metrics.kid import Kernel
from guided_distill.evaluation.metrics.metric import Metric
from guided_distill.evaluation.metrics.precision_recall import Nearness


@dataclass(frozen=True, kw_only=True)
class Measures(
    # A line registers a metric. Python lists the columns of base classes from the last to the first.
    Distillation,
    CaptionAlignment,
    ClassScore,
    Accuracy,
    Nearness,
    Kernel,
    Frechet,
):
    """All columns that are measured on n samples.

    n: the number of samples. seconds: the wall-clock time to draw them in batches, without compilation;
    None for real images.
    """

    n: int
    seconds: float | None = None


METRICS: tuple[type[Metric], ...] = Measures.__bases__
