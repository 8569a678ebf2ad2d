"""All measures of a set of samples against a reference, computed from a stream of outputs."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from guided_distill.errors import UserError
from guided_distill.evaluation.captions import Align
from guided_distill.evaluation.extractors.extractor import Extractor
from guided_distill.evaluation.metrics.frechet import FeatureStatistics, frechet_distance
from guided_distill.evaluation.metrics.inception_score import SPLITS, InceptionScore
from guided_distill.evaluation.metrics.kid import kernel_distance
from guided_distill.evaluation.metrics.precision_recall import (
    FEWEST_SAMPLES,
    Manifold,
    precision_recall,
)
from guided_distill.evaluation.outputs import Outputs
from guided_distill.evaluation.reference import MAX_FEATURES, Reference

PUBLISHED_COUNT = 50_000
"""The number of samples in the FID literature."""


@dataclass(frozen=True)
class Measures:
    """The columns of `results.csv` that are measured on n samples; None if one doesn't apply.

    seconds: the time to draw them, see `Outputs`; None for real images.
    """

    fd: float
    kid: float | None
    precision: float | None
    recall: float | None
    accuracy: float | None
    n: int
    seconds: float | None
    inception_score: float | None
    alignment: float | None
    caption_recall: float | None
    kid_std: float | None


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
) -> Measures:
    """Measure `count` samples from a stream of the extractor's outputs.

    KID, precision and recall are None if the reference holds only a mean and a covariance. Precision and
    recall use the first 10,000 samples, and are None if samples or reference features are fewer than
    FEWEST_SAMPLES. accuracy is the share of samples classified as their label, None unless the
    extractor's classes are the data's own; inception_score is None if the extractor has no classes.
    captions: [count] texts that the samples were drawn for.

    Raises UserError if the stream holds more or fewer samples.
    """
    extractor, reference = yardstick.extractor, yardstick.reference
    statistics = FeatureStatistics.empty(extractor.width)
    score: InceptionScore | None = None
    features, correct, total_seconds = np.empty((count, extractor.width), np.float32), 0, 0.0
    for some, logits, labels, seconds in outputs:
        done = statistics.count
        if done + len(some) > count:
            raise _miscounted(done + len(some), count)
        features[done : done + len(some)] = some
        statistics = statistics.accumulate(some)
        total_seconds += seconds
        if num_classes := logits.shape[1]:
            score = (score or InceptionScore.empty(count, num_classes)).accumulate(logits)
            correct += int((logits.argmax(axis=1) == labels).sum())
    if statistics.count < count:
        raise _miscounted(statistics.count, count)
    kid = nearness = alignment = None
    if reference.features is not None:
        kid = kernel_distance(reference.features, features)
        if min(count, len(reference.features)) >= FEWEST_SAMPLES:
            nearness = precision_recall(
                reference.manifold, Manifold.from_features(features[:MAX_FEATURES])
            )
    if yardstick.align is not None and captions is not None:
        alignment = yardstick.align(features, captions)
    return Measures(
        fd=frechet_distance(reference.statistics, statistics),
        kid=kid.mean if kid else None,
        precision=nearness.precision if nearness else None,
        recall=nearness.recall if nearness else None,
        accuracy=correct / count if extractor.own_classes else None,
        n=count,
        seconds=total_seconds or None,
        inception_score=score.score() if score else None,
        alignment=alignment.cosine if alignment else None,
        caption_recall=alignment.recall_at_10 if alignment else None,
        kid_std=kid.std if kid else None,
    )


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
