"""Samples for a page: the same seeds in every round, at every w, and step by step."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from etils import epath

from guided_distill.config import SECOND_STAGES
from guided_distill.errors import UserError
from guided_distill.evaluation.comparison import metric_name
from guided_distill.evaluation.drawing import PATH_STEPS, middle
from guided_distill.evaluation.results import Result
from guided_distill.files import regular_file
from guided_distill.pictures import grid_or_plot, point_plots
from guided_distill.report.figures import WORDS
from guided_distill.report.html import data_url
from guided_distill.storage import read_npz

ROW_IMAGES = 10
FEW_STEPS = 4


@dataclass(frozen=True)
class Strip:
    """A row of samples: a title, a few words, and a picture with its alternative text.

    points: whether the picture plots points in the plane. share: its share of the available width.
    """

    title: str
    words: str
    image: str
    alt: str
    points: bool
    share: float = 1.0


@dataclass(frozen=True)
class Frame:
    """The rows that a slider shows at one of its positions."""

    title: str
    rows: list[Strip]


def middle_weight(results: Iterable[Result]) -> float | None:
    """The w to show where there is room for only one."""
    weights = {result.w for result in results if result.w is not None}
    return middle(tuple(weights)) if weights else None


def rounds(workdir: epath.Path, results: Sequence[Result]) -> list[Strip]:
    """Teacher and students at the middle w, from most steps to fewest."""
    w = middle_weight(results)
    shown = [each for each in results if each.w == w and each.stage in ("teacher", *SECOND_STAGES)]
    shown.sort(key=lambda each: (each.stage != "teacher", -(each.num_steps or 0)))
    return _strips(workdir, shown)


def pair(results: Sequence[Result]) -> list[Result]:
    """Rows of the few-step students at every w, and of the teacher with the most steps at these w."""
    students = [each for each in results if each.stage in SECOND_STAGES and each.num_steps]
    if not students:
        return []
    few = min((each.num_steps or 0 for each in students), key=lambda n: (abs(n - FEW_STEPS), n))
    students = [each for each in students if each.num_steps == few]
    weights = {each.w for each in students}
    measured: dict[tuple[int, str], set[float | None]] = {}
    for each in results:
        if each.stage == "teacher" and each.w in weights:
            measured.setdefault((each.num_steps or 0, str(each.sampler)), set()).add(each.w)
    if not measured:
        return students
    # Prefer a teacher that was measured at every w to one with more steps.
    chosen = max(measured, key=lambda key: (len(measured[key]), key[0], key[1] == "ddim"))
    teachers = [
        each
        for each in results
        if each.stage == "teacher" and (each.num_steps, each.sampler) == chosen
    ]
    return [*students, *teachers]


def frames(runs: Mapping[str, tuple[epath.Path, Sequence[Result]]]) -> list[Frame]:
    """For each w, the `pair` of every run; with several runs, titles begin with the run's name."""
    pairs = {name: (workdir, pair(results)) for name, (workdir, results) in runs.items()}
    weights = sorted({each.w for _, rows in pairs.values() for each in rows if each.w is not None})
    found = []
    for w in weights:
        strips = [
            strip
            for name, (workdir, rows) in pairs.items()
            for strip in _strips(
                workdir, [each for each in rows if each.w == w], name if len(runs) > 1 else ""
            )
        ]
        if strips:
            found.append(Frame(f"w = {w:g}", strips))
    return found


def paths(workdir: epath.Path, results: Sequence[Result]) -> tuple[float | None, list[Strip]]:
    """The w at which paths were drawn, and the x predicted at each step, from most steps to fewest."""
    drawn = {
        each: file
        for each in results
        if regular_file(file := workdir / "samples" / f"{each.file_stem}_path.npz")
    }
    w = middle_weight(drawn)
    shown = sorted(
        (each for each in drawn if each.w == w),
        key=lambda each: (each.stage != "teacher", -(each.num_steps or 0)),
    )
    return w, [_path_strip(each, drawn[each]) for each in shown]


def _strips(workdir: epath.Path, results: Iterable[Result], run: str = "") -> list[Strip]:
    strips = []
    for result in results:
        file = workdir / "samples" / f"{result.file_stem}.npz"
        if not regular_file(file):
            continue
        samples, labels, _ = _read(file, "image", leading=1)
        points = samples.ndim == 2
        if not points:
            samples, labels = samples[:ROW_IMAGES], labels[:ROW_IMAGES]
        title = f"{run}: {_name(result)}" if run else _name(result)
        kind = "points in the plane" if points else "samples"
        strips.append(
            Strip(
                title=title,
                words=_measured(result),
                image=data_url(grid_or_plot(samples, labels, columns=len(samples))),
                alt=f"{len(samples)} {kind} at w = {result.w:g}: {title}; {_listed(labels)}",
                points=points,
            )
        )
    return strips


def _read(
    file: epath.Path, name: str, *, leading: int
) -> tuple[np.ndarray, np.ndarray, Mapping[str, np.ndarray]]:
    """Return a file's images or points, their labels, and all of its arrays.

    The last of the `leading` axes counts examples. Raises UserError if the file holds anything else.
    """
    arrays = read_npz(file)
    samples, labels = arrays.get(name), arrays.get("label")
    if samples is None or labels is None or not samples.size:
        raise _not_samples(file)
    widths = {leading + 1: (2,), leading + 3: (1, 3)}.get(samples.ndim, ())
    numbers = samples.dtype.kind in "fiu" and labels.dtype.kind in "iu"
    if not widths or samples.shape[-1] not in widths or not numbers:
        raise _not_samples(file)
    if labels.shape != samples.shape[leading - 1 : leading]:
        raise _not_samples(file)
    return samples, labels, arrays


def _not_samples(file: epath.Path) -> UserError:
    return UserError(
        f"{file} holds no samples that `guided-distill evaluate` wrote: remove it, and evaluate again"
    )


def _path_strip(result: Result, file: epath.Path) -> Strip:
    x, labels, others = _read(file, "x", leading=2)
    steps, count = x.shape[:2]
    times = others.get("t", np.empty(0))
    if times.shape != (steps,) or times.dtype.kind != "f":
        raise _not_samples(file)
    if x.ndim == 3:
        picture = data_url(point_plots(x, labels, size=1.6))
    else:
        # A row for each seed, a column for each step.
        images = x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
        picture = data_url(grid_or_plot(images, np.repeat(labels, steps), columns=steps))
    listed = ", ".join(f"{t:.2g}" for t in times)
    title = _name(result)
    return Strip(
        title=title,
        words=f"t = {listed}",
        image=picture,
        alt=f"x predicted for {count} samples at t = {listed}: {title}; {_listed(labels)}",
        points=False,
        share=steps / PATH_STEPS,
    )


def _name(result: Result) -> str:
    steps = "step" if result.num_steps == 1 else "steps"
    return f"{WORDS[result.stage]}, {result.num_steps} {steps} ({result.sampler})"


def _measured(result: Result) -> str:
    """The name and value of the distance, which is that of all samples of the row."""
    return f"{metric_name('fd', result.extractor)} {result.fd:.4g}"


def _listed(labels: np.ndarray) -> str:
    found = list(dict.fromkeys(labels.tolist()))
    return f"class{'es' * (len(found) > 1)} {', '.join(map(str, found))}"
