"""`report.html`: a self-contained page that shows a run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple
from typing import Any

from etils import epath

from guided_distill.config import SECOND_STAGES, Experiment
from guided_distill.errors import UserError
from guided_distill.evaluation.comparison import at_weights, comparable, metric_name, shared_weights
from guided_distill.evaluation.results import COLUMNS, Result, read_results
from guided_distill.evaluation.round_trip import RoundTrip
from guided_distill.evaluation.tables import read_rows
from guided_distill.report.figures import (
    faithfulness_column,
    loss_figure,
    mean_over_w,
    panel_figure,
    round_trip_figure,
    weight_figure,
    words_of_weights,
)
from guided_distill.report.grids import FEW_STEPS, frames, middle_weight, paths, rounds
from guided_distill.report.html import cell, data_url, render
from guided_distill.report.shortfalls import expected_stages, shortfalls
from guided_distill.runs.folder import read_config
from guided_distill.stages import all_stages
from guided_distill.storage import write_text
from guided_distill.training.record import read_metrics

Logs = Mapping[str, Sequence[Mapping[str, Any]]]


def write_report(workdir: epath.Path) -> epath.Path:
    """Write the page from the files of a run; return its path.

    Raises UserError if the folder holds no run, or one that was not evaluated.
    """
    experiment = read_config(workdir)
    results = read_results(workdir / "results.csv")
    if not results:
        raise UserError(
            f"{workdir} has no results.csv: run `guided-distill evaluate --workdir {workdir}` first"
        )
    shown = comparable(results, experiment.evaluation.extractor)
    logs = {
        stage.name: log
        for stage in all_stages(experiment)
        if (log := read_metrics(workdir / stage.name))
    }
    round_trips = read_rows(workdir / "round_trip.csv", RoundTrip)
    middle = middle_weight(shown)
    path_weight, steps = paths(workdir, shown)
    across = frames({"": (workdir, shown)})
    weights = {each.w for each in shown if each.w is not None}
    page = render(
        "page.html.jinja",
        title=f"guided_distill: {experiment.data.title}",
        headline=headline(shown),
        tiles=tiles(shown),
        shortfalls=shortfalls(workdir, experiment, shown, logs),
        weights=words_of_weights(shared_weights(shown)),
        timed=timed(shown),
        panels=_panels(shown),
        by_weight=data_url(weight_figure(shown)) if len(weights) > 1 else None,
        rounds=rounds(workdir, shown),
        middle=cell(middle),
        frames=across,
        start=(len(across) - 1) // 2,
        paths=steps,
        path_weight=cell(path_weight),
        round_trips=data_url(round_trip_figure(round_trips)) if round_trips else None,
        config=experiment,
        config_text=json.dumps(asdict(experiment), indent=2),
        stages=_stages(workdir, experiment, logs),
        losses=data_url(loss_figure(logs)) if logs else None,
        columns=COLUMNS,
        results=[list(map(cell, astuple(result))) for result in results],
    )
    path = workdir / "report.html"
    write_text(path, page)
    return path


def headline(results: Sequence[Result]) -> str:
    """A summary of the run: a few-step student, and its teacher with the most steps.

    results: rows of one extractor (`comparable`). Means are over the w at which everything was measured.
    """
    weights = shared_weights(results)
    distances = mean_over_w(at_weights(results, weights), "fd")
    teacher = distances.get(("teacher", "ddim"), {})
    students = [name for name in distances if name[0] in SECOND_STAGES]
    if not teacher or not students:
        return "Distances to the training data, and samples, of the stages trained so far."
    most = max(teacher)
    best = min(teacher, key=lambda n: teacher[n])
    curve = distances[students[0]]
    few = few_steps(curve)
    at_best = "" if best == most else f" (its best, at {best} steps: {teacher[best]:.3f})"
    count = next(result.n for result in results if result.stage != "real")
    return (
        f"The {few}-step student, with {_calls(results, students[0][0], few)} network calls per sample: "
        f"{metric_name('fd', results[0].extractor)} {curve[few]:.3f}. Its teacher: "
        f"{teacher[most]:.3f} at {most} steps, {2 * most} calls{at_best}. "
        f"{_sentence(words_of_weights(weights))}, with n = {count} samples each."
    )


def few_steps(curve: Mapping[int, Any]) -> int:
    """The students' number of steps that is nearest to FEW_STEPS."""
    return min(curve, key=lambda n: (abs(n - FEW_STEPS), n))


def tiles(results: Sequence[Result]) -> list[dict[str, str]]:
    """The gain of distillation: figures of the few-step student, each with its teacher's.

    The teacher's are with the most steps; means are as in `headline`. Empty unless both were measured.
    """
    results = at_weights(results, shared_weights(results))
    distances = mean_over_w(results, "fd")
    teacher = distances.get(("teacher", "ddim"), {})
    students = [name for name in distances if name[0] in SECOND_STAGES]
    if not teacher or not students:
        return []
    most, few = max(teacher), few_steps(distances[students[0]])
    seconds = mean_over_w(results, "seconds_per_sample")
    own, its = distances[students[0]][few], teacher[most]
    found = [
        (
            "Network calls per sample",
            str(_calls(results, students[0][0], few)),
            f"teacher: {2 * most}",
        ),
        (metric_name("fd", results[0].extractor), f"{own:.4g}", f"teacher: {its:.4g}"),
    ]
    if timed(results):
        own, its = seconds[students[0]][few], seconds["teacher", "ddim"][most]
        if own > 0 and its > 0:
            ratio = f"teacher: {_duration(its)}, {its / own:.3g} times as long"
            found.append(("Time per sample", _duration(own), ratio))
    return [{"name": name, "value": value, "words": words} for name, value, words in found]


def timed(results: Sequence[Result]) -> bool:
    """Whether the sampling time of any row is known."""
    return any(result.seconds for result in results)


def _calls(results: Sequence[Result], stage: str, num_steps: int) -> int | None:
    found = (each for each in results if (each.stage, each.num_steps) == (stage, num_steps))
    return next(found).network_calls


def _duration(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 1 else f"{1000 * seconds:.2g} ms"


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def _panels(results: Sequence[Result]) -> list[dict[str, str]]:
    """The panels: distances and faithfulness against steps, and distance against seconds if known."""
    if middle_weight(results) is None:
        return []
    panels = [("fd", "num_steps", "Distance to the training data against sampling steps")]
    if timed(results):
        words = "Distance to the training data against seconds per sample"
        panels.append(("fd", "seconds_per_sample", words))
    if column := faithfulness_column(results):
        words = f"{metric_name(column, results[0].extractor)} against sampling steps"
        panels.append((column, "num_steps", _sentence(words)))
    for column, words in (
        ("fd_teacher", "Distance to the teacher's other samples against sampling steps"),
        ("rmse_teacher", "Difference from the teacher's samples of the same noise"),
    ):
        if any(getattr(each, column) is not None for each in results):
            panels.append((column, "num_steps", words))
    return [
        {"image": data_url(panel_figure(results, column, against=against)), "alt": words}
        for column, against, words in panels
    ]


def _stages(workdir: epath.Path, experiment: Experiment, logs: Logs) -> list[list[str]]:
    """The name, updates, batch size and last loss of each stage that was or will be trained here."""
    expected = expected_stages(workdir, experiment)
    rows = []
    for stage in all_stages(experiment):
        if stage not in expected and stage.name not in logs:
            continue
        last = logs[stage.name][-1] if stage.name in logs else {}
        updates = f"{last.get('step', 0)} of {stage.total_steps}" if stage.total_steps else "none"
        batch = str(stage.settings.batch_size)
        rows.append([stage.name, updates, batch, cell(last.get("loss"))])
    return rows
