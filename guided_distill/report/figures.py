"""Figures of one run or of several."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from guided_distill.config import KINDS, SECOND_STAGES
from guided_distill.evaluation.comparison import at_weights, metric_name, shared_weights
from guided_distill.evaluation.results import COLUMNS, Result
from guided_distill.evaluation.round_trip import RoundTrip
from guided_distill.pictures import image_grid
from guided_distill.plotting import Axes, Figure, FuncFormatter, LogLocator, NullLocator


def image_rows(rows: Mapping[str, np.ndarray], *, scale: int = 8) -> Figure:
    """A figure with a row of images [n, H, W, C] in [-1, 1] for each name; n is the same in all rows."""
    pictures = [image_grid(images, columns=len(images), scale=scale) for images in rows.values()]
    width, height = pictures[0].size
    row_height = 8 * height / width
    figure = Figure(figsize=(9, row_height * len(rows)), layout="compressed")
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, name, picture in zip(panels, rows, pictures, strict=True):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def mean_over_w(results: Sequence[Result], column: str) -> dict[tuple[str, str], dict[int, float]]:
    """{(stage, sampler): {num_steps: mean of a column over the measured w}}."""
    return {
        name: {n: float(np.mean(each)) for n, each in curve.items()}
        for name, curve in _over_w(results, column).items()
    }


def error_of_mean(
    results: Sequence[Result], column: str
) -> dict[tuple[str, str], dict[int, float]]:
    """The standard errors of `mean_over_w`: NaN if unknown; {} if the column has none."""
    error = f"{column}_se"
    if error not in COLUMNS:
        return {}
    return {
        name: {n: float(np.linalg.norm(each)) / len(each) for n, each in curve.items()}
        for name, curve in _over_w(results, error).items()
    }


def _over_w(
    results: Sequence[Result], column: str
) -> dict[tuple[str, str], dict[int, list[float]]]:
    """{(stage, sampler): {num_steps: the values at the measured w}}; None becomes NaN."""
    values: dict[tuple[str, str], dict[int, list[float]]] = {}
    for result in results:
        if result.sampler is not None and result.num_steps is not None:
            curve = values.setdefault((result.stage, result.sampler), {})
            value = getattr(result, column)
            curve.setdefault(result.num_steps, []).append(np.nan if value is None else value)
    return {name: dict(sorted(curve.items())) for name, curve in values.items()}


def words_of_weights(weights: Collection[float]) -> str:
    """The words for the w that a figure averages over; without any, each point has its own w."""
    listed = ", ".join(f"{w:g}" for w in sorted(weights))
    if not weights:
        return "mean over the w that were measured"
    return f"at w = {listed}" if len(weights) == 1 else f"mean over w = {listed}"


WORDS = {name: kind.words for name, kind in KINDS.items()}
_STYLES = {"teacher": "s--", "guidance": "D"} | dict.fromkeys(SECOND_STAGES, "o-")
DISTANCES = ("fd", "fd_teacher", "rmse_teacher")
_FAITHFULNESS = ("accuracy", "alignment", "inception_score")
_PANEL = (5.0, 4.3)


def faithfulness_column(results: Sequence[Result]) -> str | None:
    """The best measured column for the faithfulness of samples to their condition, or None."""
    measured = (
        name
        for name in _FAITHFULNESS
        if any(getattr(each, name) is not None for each in results if each.stage != "real")
    )
    return next(measured, None)


def quality_figure(results: Sequence[Result]) -> Figure:
    """Distance and faithfulness to the condition against steps, in a panel each; see `panel_figure`."""
    columns = ["fd", *filter(None, [faithfulness_column(results)])]
    figure = Figure(figsize=(_PANEL[0] * len(columns), _PANEL[1]), layout="constrained")
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        _draw_panel(axes, results, column, against="num_steps")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def panel_figure(results: Sequence[Result], column: str, *, against: str = "num_steps") -> Figure:
    """A column against num_steps or seconds_per_sample: a curve for each sampler, real images dotted.

    results: rows of one extractor. Means are over the w at which everything was measured.
    """
    figure = Figure(figsize=_PANEL, layout="constrained")
    axes = figure.subplots()
    _draw_panel(axes, results, column, against=against)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(2, len(labels)))
    return figure


def _draw_panel(axes: Axes, results: Sequence[Result], column: str, *, against: str) -> None:
    weights = shared_weights(results)
    results = at_weights(results, weights)
    curves = mean_over_w(results, column)
    places = mean_over_w(results, against)
    bands = error_of_mean(results, column)
    for (stage, sampler), curve in curves.items():
        x, y = list(places[stage, sampler].values()), list(curve.values())
        axes.plot(x, y, _STYLES[stage], label=f"{WORDS[stage]}, {sampler}")
        if band := bands.get((stage, sampler)):
            low, high = (np.add(y, sign * np.array(list(band.values()))) for sign in (-2, 2))
            axes.fill_between(x, low, high, alpha=0.2, linewidth=0)
        for n, place in zip(curve, zip(x, y, strict=True), strict=True):
            if against != "num_steps" and np.isfinite(place).all():
                axes.annotate(str(n), place, (4, 4), textcoords="offset points", fontsize=8)
    real = [getattr(each, column) for each in results if each.stage == "real"]
    for value in filter(None, real[:1]):
        axes.axhline(value, color="gray", ls=":", label="real images")
    if against == "num_steps":
        step_axis(axes, {n for curve in curves.values() for n in curve})
    else:
        axes.set_xscale("log")
        axes.margins(x=0.1)
        axes.set_xlabel("seconds per sample; points are labelled with sampling steps")
    distance = column in DISTANCES
    better = " (lower is better)" if distance else ""
    axes.set_ylabel(
        f"{metric_name(column, results[0].extractor)}{better}\n{words_of_weights(weights)}"
    )
    axes.grid(alpha=0.3)
    if distance:
        plain_log_axis(axes)


def weight_figure(results: Sequence[Result]) -> Figure:
    """Distance against steps, in a small panel for each w. results: rows of one extractor."""
    weights = sorted({result.w for result in results if result.w is not None})
    columns = min(2, len(weights))
    rows = -(-len(weights) // columns)
    figure = Figure(figsize=(3.4 * columns, 0.7 + 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = grid.ravel()
    names = list(mean_over_w(results, "fd"))
    steps = {result.num_steps for result in results if result.num_steps is not None}
    for axes, w in zip(panels, weights, strict=False):
        curves = mean_over_w([result for result in results if result.w == w], "fd")
        # A missing curve is drawn empty: it keeps its colour and its place in the legend.
        for stage, sampler in names:
            curve = curves.get((stage, sampler), {})
            label = f"{WORDS[stage]}, {sampler}"
            axes.plot(list(curve), list(curve.values()), _STYLES[stage], label=label)
        step_axis(axes, steps)
        axes.tick_params(labelsize=7)
        axes.set_title(f"w = {w:g}", fontsize=9)
        axes.grid(alpha=0.3)
        axes.label_outer()
    for axes in panels[len(weights) :]:
        axes.set_axis_off()
    figure.supylabel(f"{metric_name('fd', results[0].extractor)} (lower is better)", fontsize=10)
    plain_log_axis(panels[0])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(2, len(labels)))
    return figure


def round_trip_figure(rows: Sequence[RoundTrip]) -> Figure:
    """The error of a round trip against its steps, averaged over w, of students and of plain DDIM."""
    curves: dict[bool, dict[int, list[float]]] = {True: {}, False: {}}
    for row in rows:
        by_students = row.encoder != row.decoder
        curves[by_students].setdefault(row.num_steps, []).append(row.rms_error)
    figure = Figure(figsize=_PANEL, layout="constrained")
    axes = figure.subplots()
    for by_students, curve in curves.items():
        steps = sorted(curve)
        means = [float(np.mean(curve[n])) for n in steps]
        style, label = ("o-", "students") if by_students else ("s--", "plain DDIM")
        axes.plot(steps, means, style, label=label)
    step_axis(axes, {row.num_steps for row in rows})
    axes.set_ylabel("RMS error of a round trip, mean over w")
    axes.grid(alpha=0.3)
    axes.legend()
    plain_log_axis(axes)
    return figure


def step_axis(axes: Axes, steps: Iterable[int]) -> None:
    """A logarithmic x axis with a tick at each number of steps."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(steps), [str(n) for n in sorted(steps)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("sampling steps")


def plain_log_axis(axes: Axes) -> None:
    """A logarithmic y axis with its ticks written as plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def loss_figure(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """The loss of every stage against its updates, in a small panel each."""
    columns = min(3, len(logs))
    rows = -(-len(logs) // columns)
    figure = Figure(figsize=(2.9 * columns, 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (name, log) in zip(panels, logs.items(), strict=False):
        losses = [row.get("loss") for row in log]
        axes.plot([row["step"] for row in log], losses)
        axes.set_title(name, fontsize=9)
        # The target of a one-step stochastic student is its teacher's own x: its loss is zero.
        if any(loss is not None and loss > 0 for loss in losses):
            plain_log_axis(axes)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    for axes in panels[len(logs) :]:
        axes.set_axis_off()
    return figure
