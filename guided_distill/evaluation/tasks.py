"""Which rows an evaluation has: the config's, with what the command line asks for in their place."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from etils import epath

from guided_distill.config import Evaluation, Experiment, check_extractor
from guided_distill.errors import UserError
from guided_distill.evaluation.metrics.precision_recall import FEWEST_SAMPLES
from guided_distill.evaluation.results import file_stem
from guided_distill.objectives.stage import Stage
from guided_distill.stages import all_stages


@dataclass(frozen=True)
class Selection:
    """What the command line asks for in place of the config; None leaves a thing as it is there.

    stages: folders of the workdir; None for all. num_steps: the teacher's. reference: a file of
    statistics; None for the training data's. again: whether to measure what was measured already.
    """

    extractor: str | None = None
    num_samples: int | None = None
    weights: tuple[float, ...] | None = None
    stages: tuple[str, ...] | None = None
    num_steps: tuple[int, ...] | None = None
    reference: epath.Path | None = None
    again: bool = False


class Row(NamedTuple):
    """The first columns of `results.csv`: what was measured."""

    stage: str
    sampler: str | None
    num_steps: int | None
    w: float | None


@dataclass(frozen=True)
class Task:
    """One row to measure."""

    stage: Stage
    sampler: str
    num_steps: int
    w: float

    @property
    def row(self) -> Row:
        """What tells its row from others."""
        return Row(self.stage.kind, self.sampler, self.num_steps, self.w)

    @property
    def file_stem(self) -> str:
        """The name of files about it."""
        return file_stem(*self.row)

    @property
    def network_calls(self) -> int:
        """For one sample: a network that doesn't take w is called twice a step."""
        return self.num_steps * (1 if self.stage.takes_w else 2)


def effective_settings(experiment: Experiment, request: Selection) -> Evaluation:
    """The config's settings, with what the request replaces. Raises UserError, naming the flag."""
    changes: dict[str, Any] = {
        "extractor": request.extractor,
        "num_samples": request.num_samples,
        "weights": request.weights,
        "teacher_num_steps": request.num_steps,
    }
    settings = dataclasses.replace(
        experiment.evaluation,
        **{key: value for key, value in changes.items() if value is not None},
    )
    check_extractor("--extractor", settings.extractor)
    if request.reference is not None and not request.reference.is_file():
        raise UserError(
            f"--reference {request.reference} is not a file: name one of statistics, .npz"
        )
    if settings.num_samples < FEWEST_SAMPLES:
        raise UserError(
            f"--num_samples is {settings.num_samples}: measure at least {FEWEST_SAMPLES} samples"
        )
    if min(settings.teacher_num_steps, default=1) < 1:
        raise UserError(
            f"--num_steps holds {min(settings.teacher_num_steps)}; sampling takes at least 1 step"
        )
    low, high = experiment.guidance.w_min, experiment.guidance.w_max
    for w in settings.weights:
        if not low <= w <= high:
            raise UserError(
                f"--w holds {w}, outside the range [{low}, {high}] that the students were trained on: "
                f"choose weights in it"
            )
    return settings


def tasks_of(
    experiment: Experiment, settings: Evaluation, request: Selection, workdir: epath.Path
) -> list[Task]:
    """All rows to measure, stage by stage.

    Raises UserError if nothing is trained, or a stage that the request names is not.
    """
    stages = [stage for stage in all_stages(experiment) if (workdir / stage.name).exists()]
    if not stages:
        raise UserError(f"{workdir} has no trained stage: run `guided-distill train` on it first")
    experiment = dataclasses.replace(experiment, evaluation=settings)
    names = [stage.name for stage in stages]
    for name in request.stages or ():
        if name not in names:
            raise UserError(
                f"--stages names {name}, which {workdir} has not: choose from {', '.join(names)}"
            )
    return [
        Task(stage, sampler, num_steps, w)
        for stage in stages
        if request.stages is None or stage.name in request.stages
        for sampler, num_steps in stage.samplings(experiment)
        for w in settings.weights
    ]
