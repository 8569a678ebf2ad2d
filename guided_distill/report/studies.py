"""A study's picture: the points of a sweep side by side."""

import io
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure

from guided_distill.evaluation.results import Result, metric_name
from guided_distill.report.figures import mean_over_w, plain_log_axis, step_axis


def study_figure(results: Mapping[str, Sequence[Result]]) -> bytes:
    """A PNG: distance against steps, averaged over w, a line for each point's students.

    results: rows by the point's name. The points' own teachers are drawn, pale, where they were measured.
    """
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["viridis"].resampled(max(2, len(results)))
    steps: set[int] = set()
    for index, (name, rows) in enumerate(results.items()):
        for (stage, sampler), curve in mean_over_w(rows, "fd").items():
            if stage == "guidance":
                continue
            steps |= curve.keys()
            student = stage == "halving"
            axes.plot(
                list(curve),
                list(curve.values()),
                "o-" if student else "s:",
                color=colours(index),
                alpha=1.0 if student else 0.3,
                label=f"{name}, {sampler}" if student else None,
            )
    step_axis(axes, steps)
    extractor = next(iter(results.values()))[0].extractor
    axes.set_ylabel(f"{metric_name('fd', extractor)}, mean over w (lower is better)")
    axes.grid(alpha=0.3)
    plain_log_axis(axes)
    figure.legend(loc="outside right upper", fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    return drawn.getvalue()
