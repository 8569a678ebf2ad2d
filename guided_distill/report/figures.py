"""Pictures of a run: curves by matplotlib, grids of samples by Pillow."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

from guided_distill.data.pixels import to_uint8
from guided_distill.evaluation.results import Result, metric_name
from guided_distill.evaluation.round_trip import RoundTrip

GAP = 8
"""Pixels between the images of a grid."""


def image_grid(images: np.ndarray, *, columns: int, scale: int) -> Image.Image:
    """Images [n, H, W, C] in [-1, 1], row by row, each pixel drawn as scale x scale."""
    pixels = to_uint8(images).repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = pixels.shape
    rows = -(-count // columns)
    canvas = np.full(
        (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), 255, np.uint8
    )
    for index, image in enumerate(pixels):
        top, left = (index // columns) * (height + GAP), (index % columns) * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas)


def image_rows(rows: Mapping[str, np.ndarray], *, scale: int = 8) -> Figure:
    """A row of images [n, H, W, C] in [-1, 1] for each name, as many in every row."""
    pictures = [image_grid(images, columns=len(images), scale=scale) for images in rows.values()]
    width, height = pictures[0].size
    row_height = 8 * height / width
    figure = Figure(figsize=(9, row_height * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, name, picture in zip(panels, rows, pictures, strict=True):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axes.set_axis_off()
        axes.text(-0.01, 0.5, name, ha="right", va="center", transform=axes.transAxes)
    return figure


def point_plot(points: np.ndarray, labels: np.ndarray) -> Figure:
    """Points [n, 2] in the plane, coloured by label [n]."""
    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.subplots()
    axes.scatter(points[:, 0], points[:, 1], c=labels, s=6, cmap="tab10")
    axes.set(xlim=(-2, 2), ylim=(-2, 2), aspect="equal", xticks=[], yticks=[])
    return figure


def mean_over_w(results: Sequence[Result], column: str) -> dict[tuple[str, str], dict[int, float]]:
    """{(stage, sampler): {num_steps: mean of a column over the measured w}}."""
    values: dict[tuple[str, str], dict[int, list[float]]] = {}
    for result in results:
        if result.sampler is not None and result.num_steps is not None:
            curve = values.setdefault((result.stage, result.sampler), {})
            value = getattr(result, column)
            curve.setdefault(result.num_steps, []).append(np.nan if value is None else value)
    return {
        name: {n: float(np.mean(each)) for n, each in sorted(curve.items())}
        for name, curve in values.items()
    }


_STYLES = {"teacher": "s--", "guidance": "D", "halving": "o-"}
_WORDS = {"teacher": "teacher", "guidance": "stage one", "halving": "student"}
_FAITHFULNESS = ("accuracy", "alignment", "inception_score")


def quality_figure(results: Sequence[Result]) -> Figure:
    """Distance, and faithfulness to the condition, against steps, averaged over w; real images dotted.

    Results are of one extractor. Faithfulness is the first of _FAITHFULNESS that it tells.
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    extractor = results[0].extractor
    told = [
        name for name in _FAITHFULNESS if any(getattr(each, name) is not None for each in results)
    ]
    columns = {"fd": f"{metric_name('fd', extractor)} (lower is better)"}
    columns |= {name: metric_name(name, extractor) for name in told[:1]}
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for axes, (column, words) in zip(panels, columns.items(), strict=True):
        curves = mean_over_w(results, column)
        for (stage, sampler), curve in curves.items():
            label = f"{_WORDS[stage]}, {sampler}"
            axes.plot(list(curve), list(curve.values()), _STYLES[stage], label=label)
        for result in results:
            if result.stage == "real" and getattr(result, column) is not None:
                axes.axhline(getattr(result, column), color="gray", ls=":", label="real images")
        step_axis(axes, {n for curve in curves.values() for n in curve})
        axes.set_ylabel(f"{words}, mean over w")
        axes.grid(alpha=0.3)
    plain_log_axis(figure.axes[0])
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def weight_figure(results: Sequence[Result]) -> Figure:
    """Distance against steps at every w, a small panel each. Results are of one extractor."""
    weights = sorted({result.w for result in results if result.w is not None})
    figure = Figure(figsize=(2.6 * len(weights), 3.4), layout="constrained")
    panels = figure.subplots(1, len(weights), sharey=True, squeeze=False)[0]
    names = list(mean_over_w(results, "fd"))
    steps = {result.num_steps for result in results if result.num_steps is not None}
    for axes, w in zip(panels, weights, strict=True):
        curves = mean_over_w([result for result in results if result.w == w], "fd")
        # A curve that isn't there has its place in the legend, and every curve its own colour.
        for stage, sampler in names:
            curve = curves.get((stage, sampler), {})
            label = f"{_WORDS[stage]}, {sampler}"
            axes.plot(list(curve), list(curve.values()), _STYLES[stage], label=label)
        step_axis(axes, steps)
        axes.tick_params(labelsize=7)
        axes.set_title(f"w = {w:g}", fontsize=9)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"{metric_name('fd', results[0].extractor)} (lower is better)")
    plain_log_axis(panels[0])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)))
    return figure


def round_trip_figure(rows: Sequence[RoundTrip]) -> Figure:
    """What a round trip loses against its steps, averaged over w: students and plain DDIM."""
    curves: dict[bool, dict[int, list[float]]] = {True: {}, False: {}}
    for row in rows:
        by_students = row.encoder != row.decoder
        curves[by_students].setdefault(row.num_steps, []).append(row.rms_error)
    figure = Figure(figsize=(5, 4), layout="constrained")
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
    """The loss of every stage against its updates, one small panel each."""
    columns = 4
    rows = -(-len(logs) // columns)
    figure = Figure(figsize=(10, 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (name, log) in zip(panels, logs.items(), strict=False):
        losses = [row["loss"] for row in log]
        axes.plot([row["step"] for row in log], losses)
        axes.set_title(name, fontsize=9)
        # A stochastic student of one step has its teacher's own x as its target: no loss at all.
        if any(losses):
            plain_log_axis(axes)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    for axes in panels[len(logs) :]:
        axes.set_axis_off()
    return figure
