"""What failed or is missing in a run, in sentences for its page."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from guided_distill.config import Experiment
from guided_distill.evaluation.results import Result
from guided_distill.evaluation.tasks import Selection, tasks_of
from guided_distill.objectives.stage import Stage
from guided_distill.report.figures import WORDS
from guided_distill.stages import all_stages
from guided_distill.training.record import latest_step


def shortfalls(
    workdir: epath.Path,
    experiment: Experiment,
    results: Sequence[Result],
    logs: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[str]:
    """Sentences on skipped updates, unfinished stages, and unmeasured rows of finished stages.

    results: the rows that the page shows. logs: logged metrics by the stage's name.
    """
    stages = expected_stages(workdir, experiment)
    done = {stage.name: latest_step(workdir / stage.name) for stage in stages}
    lines = [*_skipped(stages, logs)]
    for stage in stages:
        step = done[stage.name]
        if step not in (None, stage.total_steps):
            lines.append(f"{stage.name} is not finished: {step} of {stage.total_steps} updates.")
    if absent := [name for name, step in done.items() if step is None]:
        lines.append(f"Not trained in this folder: {', '.join(absent)}.")
    finished = {stage.name for stage in stages if done[stage.name] == stage.total_steps}
    return [*lines, *_unmeasured(workdir, experiment, results, finished)]


def expected_stages(workdir: epath.Path, experiment: Experiment) -> list[Stage]:
    """The stages that the config asks for; if the run starts from another run's stage, those after it."""
    stages = [stage for stage in all_stages(experiment) if experiment.stage in ("all", stage.kind)]
    if experiment.start_from:
        begun = [index for index, each in enumerate(stages) if (workdir / each.name).exists()]
        stages = stages[min(begun, default=0) :]
    return stages


def _skipped(
    stages: Sequence[Stage], logs: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Iterator[str]:
    for stage in stages:
        last = logs[stage.name][-1] if logs.get(stage.name) else {}
        if skipped := last.get("skipped", 0):
            yield (
                f"{stage.name} skipped {skipped} of its first {last['step']} updates, because the loss "
                f"or gradient was not finite."
            )


def _unmeasured(
    workdir: epath.Path, experiment: Experiment, results: Sequence[Result], finished: set[str]
) -> Iterator[str]:
    if not finished:
        return
    measured = {each.row for each in results}
    missing: dict[str, list[str]] = {}
    for task in tasks_of(experiment, experiment.evaluation, Selection(), workdir):
        if task.stage.name in finished and task.row not in measured:
            name = f"{WORDS[task.stage.kind]}, {task.num_steps} steps ({task.sampler})"
            missing.setdefault(name, []).append(f"{task.w:g}")
    for name, weights in missing.items():
        yield f"Not measured, though the config asks for it: {name} at w = {', '.join(weights)}."
