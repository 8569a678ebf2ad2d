"""All measures of one set of samples against a reference, taken from a stream of samples."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from guided_distill.errors import UserError
from guided_distill.evaluation.extractors.extractor import Extractor
from guided_distill.evaluation.metrics.alignment import Alignment
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
"""How many samples the FID literature measures."""


@dataclass(frozen=True)
class Measures:
    """What `results.csv` says of n samples; None where it can't be measured (see `measure`)."""

    fd: float
    kid: float | None
    precision: float | None
    recall: float | None
    accuracy: float | None
    n: int
    inception_score: float | None
    alignment: float | None
    caption_recall: float | None
    kid_std: float | None


def measure(
    outputs: Iterable[Outputs],
    *,
    count: int,
    extractor: Extractor,
    reference: Reference,
    align: Callable[[np.ndarray], Alignment] | None = None,
) -> Measures:
    """Measures of `count` samples, from what the extractor says of them, some at a time.

    KID, precision and recall need features of the reference and are None where it has only a mean and
    a covariance; the last two look at the first 10,000 samples, and are None for fewer than
    FEWEST_SAMPLES on either side. accuracy is the share of samples that
    are given their class, None unless the extractor's classes are the data's own; inception_score is
    None if it has no classes. align: measures
    features against the samples' captions, where they have some.
    """
    statistics = FeatureStatistics.empty(extractor.width)
    score: InceptionScore | None = None
    features, correct = np.empty((count, extractor.width), np.float32), 0
    for some, logits, labels in outputs:
        done = statistics.count
        if done + len(some) > count:
            raise _miscounted(done + len(some), count)
        features[done : done + len(some)] = some
        statistics = statistics.accumulate(some)
        if num_classes := logits.shape[1]:
            score = (score or InceptionScore.empty(count, num_classes)).accumulate(logits)
            correct += int((logits.argmax(axis=1) == labels).sum())
    if statistics.count < count:
        raise _miscounted(statistics.count, count)
    kid = nearness = None
    if reference.features is not None:
        kid = kernel_distance(reference.features, features)
        if min(count, len(reference.features)) >= FEWEST_SAMPLES:
            nearness = precision_recall(
                reference.manifold, Manifold.from_features(features[:MAX_FEATURES])
            )
    alignment = align(features) if align else None
    return Measures(
        fd=frechet_distance(reference.statistics, statistics),
        kid=kid.mean if kid else None,
        precision=nearness.precision if nearness else None,
        recall=nearness.recall if nearness else None,
        accuracy=correct / count if extractor.own_classes else None,
        n=count,
        inception_score=score.score() if score else None,
        alignment=alignment.cosine if alignment else None,
        caption_recall=alignment.recall_at_10 if alignment else None,
        kid_std=kid.std if kid else None,
    )


def shortages(*, train: int, test: int) -> list[str]:
    """What can't be measured with so few images in the data's splits; a line each.

    Raises UserError if nothing can.
    """
    if train < 2:
        raise UserError(f"the training split has {train} image: an evaluation needs 2, so add some")
    lines = []
    if test < 2:
        lines.append(f"the test split has {test} image: results.csv gets no row of real ones")
    for split, count in (("training", train), ("test", test)):
        if 2 <= count < FEWEST_SAMPLES:
            lines.append(
                f"the {split} split has {count} images: precision and recall need {FEWEST_SAMPLES} and "
                f"are left out{' of the row of real ones' if split == 'test' else ''}"
            )
    return lines


def _miscounted(found: int, count: int) -> UserError:
    return UserError(
        f"there are features of {found} samples or more, and {count} are to be measured: remove the "
        f"folder evaluation of the workdir, and evaluate again"
    )


def caveats(count: int, width: int, reference: Reference) -> list[str]:
    """What to know of measures of so few samples, in features of so many dimensions; a line each."""
    lines = []
    if reference.features is None:
        lines.append(
            f"the statistics of {reference.of} don't say what made them, and must be of this extractor: "
            f"of inception, by pytorch-fid, for those of the TensorFlow graph (as ADM publishes) are "
            f"of slightly different features; there is no kernel distance, precision or recall"
        )
    if count < PUBLISHED_COUNT:
        lines.append(
            f"n = {count} samples a row: don't compare these figures with published ones, which are of "
            f"{PUBLISHED_COUNT}; the Inception Score of {SPLITS} splits can't exceed n / {SPLITS}"
        )
    if count <= width:
        lines.append(
            f"warning: n = {count} is not above the {width} dimensions of the features: their "
            f"covariance is rank-deficient, so the Fréchet distance means nothing; the kernel distance "
            f"is unbiased and holds, precision and recall hold at equal n"
        )
    return lines
