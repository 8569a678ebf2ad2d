"""The rows of an evaluation: those of the config, as overridden by the command line."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from etils import epath

from guided_distill.config import Evaluation, Experiment, check_extractor
from guided_distill.errors import UserError
from guided_distill.evaluation.metrics.precision_recall import FEWEST_SAMPLES
from guided_distill.evaluation.results import Row
from guided_distill.objectives.stage import Stage
from guided_distill.stages import all_stages


@dataclass(frozen=True)
class Selection:
    """The command line's settings of `evaluate`; None keeps the config's.

    stages: folders of the workdir; None for all. num_steps, against_teacher: the teacher's. reference: a
    file of statistics; None for those of the training data. again: whether to measure again the rows
    that were measured already.
    """

    extractor: str | None = None
    num_samples: int | None = None
    weights: tuple[float, ...] | None = None
    stages: tuple[str, ...] | None = None
    num_steps: tuple[int, ...] | None = None
    against_teacher: int | None = None
    reference: epath.Path | None = None
    again: bool = False


@dataclass(frozen=True)
class Task:
    """One row to measure."""

    stage: Stage
    sampler: str
    num_steps: int
    w: float

    @property
    def row(self) -> Row:
        """The columns that identify the task's row."""
        return Row(self.stage.kind, self.sampler, self.num_steps, self.w)

    @property
    def network_calls(self) -> int:
        """Network calls for one sample; a network that isn't conditioned on w needs two per step."""
        return self.num_steps * (1 if self.stage.takes_w else 2)


def effective_settings(experiment: Experiment, request: Selection) -> Evaluation:
    """The config's settings with the request's changes. Raises UserError, naming the flag."""
    changes: dict[str, Any] = {
        "extractor": request.extractor,
        "num_samples": request.num_samples,
        "weights": request.weights,
        "teacher_num_steps": request.num_steps,
        "against_teacher": request.against_teacher,
    }
    settings = dataclasses.replace(
        experiment.evaluation,
        **{key: value for key, value in changes.items() if value is not None},
    )
    check_extractor("--extractor", settings.extractor)
    if request.reference is not None and not request.reference.is_file():
        raise UserError(
            f"--reference {request.reference} is not a file: name an .npz file of statistics"
        )
    if settings.num_samples < FEWEST_SAMPLES:
        raise UserError(
            f"--num_samples is {settings.num_samples}: make it at least {FEWEST_SAMPLES}"
        )
    if min(settings.teacher_num_steps, default=1) < 1:
        raise UserError(f"--num_steps holds {min(settings.teacher_num_steps)}; make it at least 1")
    low, high = experiment.guidance.w_min, experiment.guidance.w_max
    for w in settings.weights:
        if not low <= w <= high:
            raise UserError(
                f"--w holds {w}, outside the range [{low}, {high}] that the students were trained on: "
                f"choose weights in that range"
            )
    return settings


def tasks_of(
    experiment: Experiment, settings: Evaluation, request: Selection, workdir: epath.Path
) -> list[Task]:
    """All rows to measure, stage by stage.

    Raises UserError if no stage is trained, or if one that the request names isn't.
    """
    stages = [stage for stage in all_stages(experiment) if (workdir / stage.name).exists()]
    if not stages:
        raise UserError(f"{workdir} has no trained stage: run `guided-distill train` on it first")
    experiment = dataclasses.replace(experiment, evaluation=settings)
    names = [stage.name for stage in stages]
    for name in request.stages or ():
        if name not in names:
            raise UserError(
                f"--stages names {name}, which {workdir} doesn't have: choose from {', '.join(names)}"
            )
    return [
        Task(stage, sampler, num_steps, w)
        for stage in stages
        if request.stages is None or stage.name in request.stages
        for sampler, num_steps in stage.samplings(experiment)
        for w in settings.weights
    ]
