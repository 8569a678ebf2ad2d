"""All measures of a set of samples against a reference, computed from a stream of outputs."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from guided_distill.errors import UserError
from guided_distill.evaluation.captions import Align
from guided_distill.evaluation.extractors.extractor import Extractor
from guided_distill.evaluation.metrics.frechet import FeatureStatistics
from guided_distill.evaluation.metrics.inception_score import SPLITS
from guided_distill.evaluation.metrics.metric import Samples
from guided_distill.evaluation.metrics.precision_recall import FEWEST_SAMPLES
from guided_distill.evaluation.metrics.registry import METRICS, Measures
from guided_distill.evaluation.outputs import Outputs
from guided_distill.evaluation.reference import Reference
from guided_distill.evaluation.teacher import TeacherSamples

PUBLISHED_COUNT = 50_000
"""The number of samples in the FID literature."""


@dataclass(frozen=True, eq=False)
class Yardstick:
    """What samples are measured with: an extractor of features, and a reference.

    align: the measure of alignment with captions; None for runs without captions.
    """

    extractor: Extractor
    reference: Reference
    align: Align | None = None

    @property
    def name(self) -> str:
        """The extractor's name, followed by @FILE if the reference is a file of other data."""
        of = self.reference.of
        return f"{self.extractor.name}@{of}" if of else self.extractor.name


def measure(
    outputs: Iterable[Outputs],
    yardstick: Yardstick,
    *,
    count: int,
    captions: np.ndarray | None = None,
    teacher: TeacherSamples | None = None,
) -> Measures:
    """Measure `count` samples from a stream of the extractor's outputs with all METRICS.

    captions, teacher: as in `Samples`. Raises UserError if the stream holds more or fewer samples.
    """
    extractor = yardstick.extractor
    statistics = FeatureStatistics.empty(extractor.width)
    errors, total_seconds = np.full(count, np.nan), 0.0
    features = np.empty((count, extractor.width), np.float32)
    logits: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for each in outputs:
        done = statistics.count
        rows = slice(done, done + len(each.features))
        if rows.stop > count:
            raise _miscounted(rows.stop, count)
        features[rows] = each.features
        if each.squared_errors is not None:
            errors[rows] = each.squared_errors
        logits.append(each.logits)
        labels.append(each.labels)
        statistics = statistics.accumulate(each.features)
        total_seconds += each.seconds
    if statistics.count < count:
        raise _miscounted(statistics.count, count)
    samples = Samples(
        features=features,
        logits=np.concatenate(logits),
        statistics=statistics,
        labels=np.concatenate(labels),
        own_classes=extractor.own_classes,
        reference=yardstick.reference,
        captions=captions,
        align=yardstick.align,
        teacher=teacher,
        squared_errors=errors,
    )
    columns: dict[str, Any] = {}
    for metric in METRICS:
        columns |= asdict(metric.of(samples))
    return Measures(**columns, n=count, seconds=total_seconds or None)


def _miscounted(found: int, count: int) -> UserError:
    return UserError(
        f"there are features of at least {found} samples, but {count} samples to measure: remove the "
        f"folder evaluation in the workdir, and evaluate again"
    )


def shortages(*, train: int, test: int) -> list[str]:
    """Lines on what can't be measured because the data's splits have too few images.

    Raises UserError if nothing can be measured.
    """
    if train < 2:
        raise UserError(f"the training split has {train} image: add more; an evaluation needs 2")
    lines = []
    if test < 2:
        lines.append(f"the test split has {test} image: results.csv gets no row of real images")
    for split, count in (("training", train), ("test", test)):
        if 2 <= count < FEWEST_SAMPLES:
            lines.append(
                f"the {split} split has {count} images: precision and recall need {FEWEST_SAMPLES} and "
                f"are left out{' of the row of real images' if split == 'test' else ''}"
            )
    return lines


def caveats(count: int, yardstick: Yardstick) -> list[str]:
    """Lines on the limits of measures with this yardstick and number of samples."""
    reference, width = yardstick.reference, yardstick.extractor.width
    lines = []
    if reference.features is None:
        lines.append(
            f"the statistics of {reference.of} don't say how they were made: make sure that they are of "
            f"this extractor (for inception, by pytorch-fid; those of the TensorFlow graph, which ADM "
            f"publishes, are of slightly different features); kernel distance, precision and recall are "
            f"left out"
        )
    if count < PUBLISHED_COUNT:
        lines.append(
            f"n = {count} samples per row: don't compare these figures with published ones, which use "
            f"{PUBLISHED_COUNT}; the Inception Score over {SPLITS} splits can't exceed n / {SPLITS}"
        )
    if count <= width:
        lines.append(
            f"warning: n = {count} does not exceed the {width} dimensions of the features: their "
            f"covariance is rank-deficient, so the Fréchet distance is meaningless; the kernel distance "
            f"is unbiased and remains valid, as do precision and recall at equal n"
        )
    return lines
