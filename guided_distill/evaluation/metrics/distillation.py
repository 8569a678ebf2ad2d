"""What distillation itself loses: distances between a student and its teacher, whatever its quality."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from guided_distill.evaluation.metrics.frechet import (
    FeatureStatistics,
    frechet_distance,
    frechet_standard_error,
)
from guided_distill.evaluation.metrics.kid import kernel_distance
from guided_distill.evaluation.metrics.metric import Metric, Samples


@dataclass(frozen=True, kw_only=True)
class Distillation(Metric):
    """Distances to the teacher's samples at the same w; all None if there are none to compare with.

    fd_teacher, kid_teacher: Fréchet and kernel distance to as many samples of the teacher from other
    seeds; the row of the teacher with the same number of steps shows the floor. fd_teacher_se: standard
    error of fd_teacher, from the sampling of both. rmse_teacher: root mean square difference from the
    teacher's samples of the same noise, with pixels in [-1, 1]; None for stochastic samplers.
    """

    fd_teacher: float | None = field(
        default=None, metadata={"title": "Fréchet distance to the teacher"}
    )
    fd_teacher_se: float | None = None
    kid_teacher: float | None = field(
        default=None, metadata={"title": "kernel distance to the teacher"}
    )
    rmse_teacher: float | None = field(
        default=None, metadata={"title": "RMS difference from the teacher"}
    )

    @classmethod
    def of(cls, samples: Samples) -> Self:
        """The distances of the samples to the teacher's."""
        if samples.teacher is None:
            return cls()
        own, others = samples.statistics, samples.teacher.features
        theirs = FeatureStatistics.from_features(others)
        own_error = frechet_standard_error(samples.features, own, theirs)
        their_error = frechet_standard_error(others, theirs, own)
        known = np.isfinite(samples.squared_errors)
        return cls(
            fd_teacher=frechet_distance(own, theirs),
            fd_teacher_se=own_error and their_error and math.hypot(own_error, their_error),
            kid_teacher=kernel_distance(others, samples.features).mean,
            rmse_teacher=float(np.sqrt(samples.squared_errors[known].mean()))
            if known.any()
            else None,
        )
