"""A figure of several runs: the points of a sweep, or the runs to compare."""

from collections.abc import Mapping, Sequence

import numpy as np

from guided_distill.config import SECOND_STAGES
from guided_distill.evaluation.comparison import at_weights, metric_name, shared_weights
from guided_distill.evaluation.results import Result
from guided_distill.plotting import Figure, colormaps
from guided_distill.report.figures import (
    mean_over_w,
    plain_log_axis,
    step_axis,
    words_of_weights,
)

_MARKERS = "osD^v<>PX*"


def study_figure(results: Mapping[str, Sequence[Result]]) -> Figure:
    """Distance against steps: a line for each run's students, and a pale one for its teacher.

    results: rows by the run's name, of one extractor and number of samples. Means are over the w at which
    everything was measured.
    """
    weights = shared_by_all(results)
    figure = Figure(figsize=(6.5, 4.2 + 0.2 * len(results)), layout="constrained")
    axes = figure.subplots()
    # The upper end of the colour map is too bright for lines on white.
    colours = colormaps["viridis"](np.linspace(0.0, 0.85, len(results)))
    steps: set[int] = set()
    for index, (name, rows) in enumerate(results.items()):
        marker = _MARKERS[index % len(_MARKERS)]
        for (stage, sampler), curve in mean_over_w(at_weights(rows, weights), "fd").items():
            if stage == "guidance":
                continue
            steps |= curve.keys()
            student = stage in SECOND_STAGES
            axes.plot(
                list(curve),
                list(curve.values()),
                f"{marker}-" if student else f"{marker}:",
                color=colours[index],
                alpha=1.0 if student else 0.3,
                label=f"{name}, {sampler}" if student else None,
            )
    step_axis(axes, steps)
    extractor = next(iter(results.values()))[0].extractor
    axes.set_ylabel(
        f"{metric_name('fd', extractor)} (lower is better)\n{words_of_weights(weights)}"
    )
    axes.grid(alpha=0.3)
    plain_log_axis(axes)
    if axes.get_legend_handles_labels()[0]:
        title = "students (pale: their teachers)"
        figure.legend(loc="outside lower left", fontsize=8, title=title)
    return figure


def without_shared_parts(names: Sequence[str]) -> list[str]:
    """Shorten names of a sweep's points, KEY=VALUE,KEY=VALUE, to the parts that differ; keep others."""
    parts = [name.split(",") for name in names]
    shared = set.intersection(*map(set, parts)) if parts else set()
    short = [",".join(part for part in each if part not in shared) for each in parts]
    return short if all(short) and len(set(short)) == len(short) else list(names)


def shared_by_all(results: Mapping[str, Sequence[Result]]) -> set[float]:
    """The w at which everything in every run was measured."""
    each = [shared_weights(rows) for rows in results.values()]
    return set.intersection(*each) if each else set()
