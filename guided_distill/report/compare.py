"""A self-contained page that compares runs side by side."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple
from typing import Any, NamedTuple

from etils import epath
from markupsafe import Markup

from guided_distill.config import SECOND_STAGES, Data, Experiment, differences
from guided_distill.errors import UserError
from guided_distill.evaluation.comparison import at_weights, metric_name
from guided_distill.evaluation.results import COLUMNS, Result, read_results
from guided_distill.experiments.studies import shared_by_all, study_figure, without_shared_parts
from guided_distill.report.figures import mean_over_w, words_of_weights
from guided_distill.report.grids import frames
from guided_distill.report.html import cell, data_url, render
from guided_distill.runs.folder import read_config
from guided_distill.storage import write_text

FEW_STEPS = 8
"""The first table holds the students of at most this many steps."""


class Run(NamedTuple):
    """A run's folder, config, and all rows of its results.csv."""

    workdir: epath.Path
    experiment: Experiment
    results: list[Result]


class Ground(NamedTuple):
    """What distances must share to be comparable: the data, and how samples were measured.

    extractor: as in `results.csv`, which includes the reference if it isn't the training data.
    """

    data: str
    image_size: int | None
    extractor: str
    n: int

    def __str__(self) -> str:
        size = f" at {self.image_size} pixels" if self.image_size else ""
        return f"{Data(self.data).title}{size}, {self.extractor}, n = {self.n}"


def write_comparison(workdirs: Sequence[epath.Path], out: epath.Path) -> epath.Path:
    """Write the page from the files of runs; return its path. Files among the workdirs are skipped.

    Raises UserError if a folder holds no run, if no run was evaluated, or if the page can't be written.
    """
    runs = read_runs(workdirs)
    shown, ground = comparable_runs(runs)
    rows = {name: run.results for name, run in shown.items()}
    weights = shared_by_all(rows)
    across = frames({name: (run.workdir, run.results) for name, run in shown.items()})
    page = render(
        "compare.html.jinja",
        title=f"guided_distill: {len(runs)} run{'s' * (len(runs) > 1)} side by side",
        ground=str(ground),
        metric=metric_name("fd", ground.extractor),
        weights=words_of_weights(weights),
        left_out=[
            f"{name}: {why_left_out(run)}" for name, run in runs.items() if name not in shown
        ],
        summary=summary({name: at_weights(each, weights) for name, each in rows.items()}),
        figure_image=data_url(study_figure(rows)),
        frames=across,
        start=(len(across) - 1) // 2,
        same_seed=len({each.seed for found in rows.values() for each in found}) == 1,
        names=list(runs),
        changes=config_changes({name: run.experiment for name, run in runs.items()}),
        columns=("run", *COLUMNS),
        results=[
            [name, *map(cell, astuple(result))]
            for name, run in runs.items()
            for result in run.results
        ],
    )
    write_text(out, page)
    return out


def read_runs(workdirs: Sequence[epath.Path]) -> dict[str, Run]:
    """The runs by name: the folder's name, or its whole path if two folders have the same name.

    Names of a sweep's points, KEY=VALUE,KEY=VALUE, are shortened to the parts that differ.
    """
    folders = [each for each in dict.fromkeys(workdirs) if not each.is_file()]
    if not folders:
        raise UserError("none of the arguments is a folder: name the folders of runs")
    names = without_shared_parts([each.name for each in folders])
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    return {
        name: Run(each, read_config(each), read_results(each / "results.csv"))
        for name, each in zip(names, folders, strict=True)
    }


def comparable_runs(runs: Mapping[str, Run]) -> tuple[dict[str, Run], Ground]:
    """The ground that most runs share, and those runs, each with only its rows on that ground.

    Ties are broken by the number of rows, then by the larger n. Rows of real images are kept. Raises
    UserError if no run was evaluated.
    """
    grounds = {name: Counter(_grounds(run)) for name, run in runs.items()}
    shares = Counter(ground for found in grounds.values() for ground in found)
    sizes = sum(grounds.values(), Counter())
    if not shares:
        raise UserError(
            "none of the runs was evaluated: run `guided-distill evaluate --workdir` on them first"
        )
    ground = max(shares, key=lambda each: (shares[each], sizes[each], each.n))
    return {
        name: run._replace(
            results=[
                each
                for each in run.results
                if each.extractor == ground.extractor
                and (each.stage == "real" or each.n == ground.n)
            ]
        )
        for name, run in runs.items()
        if ground in grounds[name]
    }, ground


def summary(runs: Mapping[str, Sequence[Result]]) -> tuple[list[str], list[list[str]]]:
    """The head and body of a table: a row for each run and sampler of its students, with its teacher.

    Values are mean distances; the lowest of each column is bold.
    """
    curves = {name: mean_over_w(results, "fd") for name, results in runs.items()}
    students = [
        (name, sampler, curve)
        for name, found in curves.items()
        for (stage, sampler), curve in found.items()
        if stage in SECOND_STAGES
    ]
    steps = sorted({n for *_, curve in students for n in curve if n <= FEW_STEPS}, reverse=True)
    least = {n: min(curve[n] for *_, curve in students if n in curve) for n in steps}
    body = []
    for name, sampler, curve in students:
        cells = [
            Markup("<strong>{}</strong>").format(text) if curve.get(n) == least[n] else text
            for n in steps
            for text in [cell(curve.get(n))]
        ]
        body.append([name, sampler, _teacher(curves[name]), *cells])
    heads = [f"{n} step{'s' * (n > 1)}" for n in steps]
    return ["run", "students", "its teacher", *heads], body


def _teacher(curves: Mapping[tuple[str, str], Mapping[int, float]]) -> str:
    found = {sampler: curve for (stage, sampler), curve in curves.items() if stage == "teacher"}
    if not found:
        return "not measured"
    curve = found.get("ddim") or next(iter(found.values()))
    most = max(curve)
    return f"{cell(curve[most])} ({most} steps)"


def config_changes(experiments: Mapping[str, Experiment]) -> list[list[str]]:
    """The keys whose values differ between configs, each with its value in every run."""
    configs = [asdict(experiment) for experiment in experiments.values()]
    changes = [differences(configs[0], other) for other in configs]
    first = {key: values[0] for found in changes for key, values in found.items()}
    return [
        [key, *(_value(found.get(key, (None, first[key]))[1]) for found in changes)]
        for key in sorted(first)
    ]


def _value(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_value, value)) or "none"
    return "none" if value is None else str(value)


def _grounds(run: Run) -> list[Ground]:
    data = run.experiment.data
    return [
        Ground(data.name, data.image_size, each.extractor, each.n)
        for each in run.results
        if each.stage != "real"
    ]


def why_left_out(run: Run) -> str:
    """Why a run is left out of the comparison."""
    grounds = dict.fromkeys(map(str, _grounds(run)))
    return f"measured on {'; '.join(grounds)}" if grounds else "not evaluated"
