"""One self-contained page that shows a run: `report.html`."""

import base64
import io
import json
from dataclasses import asdict, astuple
from typing import Any

import jinja2
import numpy as np
from etils import epath
from matplotlib.figure import Figure
from PIL import Image

from guided_distill.config import Experiment
from guided_distill.errors import UserError
from guided_distill.evaluation.results import (
    COLUMNS,
    Result,
    comparable,
    metric_name,
    read_results,
    read_rows,
)
from guided_distill.evaluation.round_trip import RoundTrip
from guided_distill.pipeline import read_config
from guided_distill.report.figures import (
    image_grid,
    loss_figure,
    mean_over_w,
    point_plot,
    quality_figure,
    round_trip_figure,
    weight_figure,
)
from guided_distill.stages import all_stages
from guided_distill.training.checkpoints import write_text
from guided_distill.training.metrics import read_metrics

PIXELS = 8
"""How large a sample's pixel is drawn."""

ROW_IMAGES = 10
FEW_STEPS = 4


def write_report(workdir: epath.Path) -> epath.Path:
    """Write the page from the files of a run; answer its path.

    Raises UserError if the folder holds no run or was not evaluated.
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
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("guided_distill.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("page.html.jinja").render(
        title=f"guided_distill: {experiment.data.name}",
        headline=headline(shown),
        config=experiment,
        config_text=json.dumps(asdict(experiment), indent=2),
        stages=_stages(experiment, logs),
        quality=_figure_url(quality_figure(shown)),
        by_weight=_figure_url(weight_figure(shown)),
        losses=_figure_url(loss_figure(logs)),
        grids=_grids(workdir, shown),
        round_trips=_figure_url(round_trip_figure(round_trips)) if round_trips else None,
        columns=COLUMNS,
        results=[[_cell(value) for value in astuple(result)] for result in results],
    )
    path = workdir / "report.html"
    write_text(path, page)
    return path


def headline(results: list[Result]) -> str:
    """The run in a sentence: a few-step student beside its teacher at most steps, mean over w.

    results: those of one extractor (`comparable`).
    """
    distances = mean_over_w(results, "fd")
    teacher = distances.get(("teacher", "ddim"), {})
    students = [curve for (stage, _), curve in distances.items() if stage == "halving"]
    if not teacher or not students:
        return "Distances to the training data, and samples, of what was trained so far."
    most = max(teacher)
    best = min(teacher, key=lambda n: teacher[n])
    few = min(students[0], key=lambda n: abs(n - FEW_STEPS))
    at_best = "" if best == most else f" (its best, at {best} steps: {teacher[best]:.3f})"
    count = next(result.n for result in results if result.stage != "real")
    return (
        f"The {few}-step student, with {few} network calls a sample: "
        f"{metric_name('fd', results[0].extractor)} {students[0][few]:.3f}. Its teacher: "
        f"{teacher[most]:.3f} at {most} steps, {2 * most} calls{at_best}. Means over the guidance "
        f"weights, of n = {count} samples each."
    )


def _stages(experiment: Experiment, logs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    rows = []
    for stage in all_stages(experiment):
        last = logs.get(stage.name, [{}])[-1]
        rows.append(
            {
                "name": stage.name,
                "done": last.get("step", 0),
                "total": stage.total_steps,
                "batch": stage.settings.batch_size,
                "loss": _cell(last.get("loss")),
            }
        )
    return rows


def _grids(workdir: epath.Path, results: list[Result]) -> list[dict[str, Any]]:
    """Down the rounds at the middle w, and across w for a few-step student and its teacher."""
    measured = [result for result in results if result.w is not None and result.num_steps]
    weights = sorted({result.w for result in measured if result.w is not None})
    if not weights:
        return []
    middle = weights[(len(weights) - 1) // 2]
    rounds = [result for result in measured if result.w == middle and result.stage != "guidance"]
    rounds.sort(key=lambda result: (result.stage != "teacher", -(result.num_steps or 0)))
    few = min(
        (
            abs((result.num_steps or 0) - FEW_STEPS)
            for result in rounds
            if result.stage == "halving"
        ),
        default=None,
    )
    across = [
        result
        for result in measured
        if result.stage == "halving" and abs((result.num_steps or 0) - FEW_STEPS) == few
    ]
    grids = [
        {
            "title": "The same seeds down the rounds",
            "words": f"Guidance weight w = {middle:g}. A column has one seed and one label.",
            "rows": _rows(workdir, rounds, weights=False),
        },
        {
            "title": "The same seeds across the guidance weight",
            "words": "A few-step student: one network for every w.",
            "rows": _rows(workdir, across, weights=True),
        },
    ]
    return [grid for grid in grids if grid["rows"]]


def _rows(workdir: epath.Path, results: list[Result], *, weights: bool) -> list[dict[str, str]]:
    rows = []
    for result in results:
        name = f"{result.stage}_{result.sampler}_{result.num_steps}_w{result.w:g}.npz"
        path = workdir / "samples" / name
        if path.exists():
            who = "teacher" if result.stage == "teacher" else "student"
            steps = f"{who}, {result.num_steps} {'step' if result.num_steps == 1 else 'steps'}"
            title = f"{steps}, w = {result.w:g}" if weights else f"{steps}, {result.sampler}"
            rows.append({"title": title, "image": _samples_url(path)})
    return rows


def _samples_url(path: epath.Path) -> str:
    with path.open("rb") as file, np.load(file) as arrays:
        samples, labels = arrays["image"], arrays["label"]
    if samples.ndim == 2:
        return _figure_url(point_plot(samples, labels))
    images = samples[:ROW_IMAGES]
    return _picture_url(image_grid(images, columns=len(images), scale=PIXELS))


def _picture_url(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return _url(data.getvalue())


def _figure_url(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return _url(data.getvalue())


def _url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
