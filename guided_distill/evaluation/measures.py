"""All measures of one set of samples against a reference, taken from a stream of samples."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from guided_distill.errors import UserError
from guided_distill.evaluation.alignment import Alignment
from guided_distill.evaluation.extractor import Extractor
from guided_distill.evaluation.frechet import FeatureStatistics, frechet_distance
from guided_distill.evaluation.inception_score import SPLITS, InceptionScore
from guided_distill.evaluation.kid import kernel_distance
from guided_distill.evaluation.outputs import Outputs
from guided_distill.evaluation.precision_recall import Manifold, precision_recall
from guided_distill.evaluation.reference import MAX_FEATURES, Reference

PUBLISHED_COUNT = 50_000
"""How many samples the FID literature measures."""


@dataclass(frozen=True)
class Measures:
    """What `results.csv` says of n samples; None where it can't be told (see `measure`)."""

    fd: float
    kid: float | None
    precision: float | None
    recall: float | None
    accuracy: float | None
    n: int
    inception_score: float | None
    alignment: float | None
    caption_recall: float | None


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
    a covariance; the last two look at the first 10,000 samples. accuracy is the share of samples that
    are given their class, None unless the extractor's classes are the data's own; inception_score is
    None if it has no classes. align: measures
    features against the samples' captions, where they have some.
    """
    statistics = FeatureStatistics.empty(extractor.width)
    score: InceptionScore | None = None
    kept, correct = [], 0
    for features, logits, labels in outputs:
        if statistics.count + len(features) > count:
            raise _miscounted(statistics.count + len(features), count)
        statistics = statistics.accumulate(features)
        if num_classes := logits.shape[1]:
            score = (score or InceptionScore.empty(count, num_classes)).accumulate(logits)
            correct += int((logits.argmax(axis=1) == labels).sum())
        kept.append(features)
    if statistics.count < count:
        raise _miscounted(statistics.count, count)
    features = np.concatenate(kept)
    kid = nearness = None
    if reference.features is not None and reference.manifold is not None:
        kid = kernel_distance(reference.features, features)
        nearness = precision_recall(
            reference.manifold, Manifold.from_features(features[:MAX_FEATURES])
        )
    alignment = align(features) if align else None
    return Measures(
        fd=frechet_distance(reference.statistics, statistics),
        kid=kid,
        precision=nearness.precision if nearness else None,
        recall=nearness.recall if nearness else None,
        accuracy=correct / count if extractor.own_classes else None,
        n=count,
        inception_score=score.score() if score else None,
        alignment=alignment.cosine if alignment else None,
        caption_recall=alignment.recall_at_10 if alignment else None,
    )


def _miscounted(found: int, count: int) -> UserError:
    return UserError(
        f"there are features of {found} samples or more, and {count} are to be measured: remove the "
        f"folder evaluation of the workdir, and evaluate again"
    )


def caveats(count: int, width: int) -> list[str]:
    """What to know of measures of so few samples, in features of so many dimensions; a line each."""
    lines = []
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
