"""The verbs of many runs: sweep and compare."""

import argparse
import inspect
import re
import runpy
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from guided_distill.errors import UserError
from guided_distill.verbs.runs import add_config, find_config, read_config_file
from guided_distill.verbs.shared import CACHE, command, keep_compiled_programs, path

_CONFIG = "config_file"
"""The module name of a config file while its sweeps are looked up."""


def add_verbs(verbs: Any) -> None:
    """Add these verbs to the parser."""
    sweep = command(
        verbs,
        "sweep",
        _sweep,
        "train and evaluate a config at every point of a sweep; run again to resume",
        "guided-distill sweep --config configs/digits.py --sweep guidance_range --workdir runs/range",
    )
    add_config(sweep)
    sweep.add_argument(
        "--sweep",
        required=True,
        help="a function of the config file, or a name in guided_distill.experiments.sweeps.ABLATIONS",
    )
    sweep.add_argument(
        "--workdir",
        type=path,
        help="the study's folder (default: runs/CONFIG_SWEEP)",
    )
    sweep.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="run every N-th point, starting with the I-th, counted from 0; run one shard per machine",
    )
    sweep.add_argument("--cache", **CACHE)

    compare = command(
        verbs,
        "compare",
        _compare,
        "write a page that compares runs side by side",
        "guided-distill compare runs/range/* --out compare.html",
    )
    compare.add_argument("runs", nargs="+", type=path, metavar="RUN", help="a run's folder")
    compare.add_argument(
        "--out",
        type=path,
        default=epath.Path("compare.html"),
        help="the page's file (default: %(default)s)",
    )


def _sweep(options: argparse.Namespace, overrides: list[str]) -> None:
    from guided_distill import config
    from guided_distill.experiments.studies import study_figure, without_shared_parts
    from guided_distill.experiments.study import Run, run_study, write_table
    from guided_distill.experiments.sweeps import name_of, with_overrides
    from guided_distill.pictures import png
    from guided_distill.storage import write_bytes
    from guided_distill.training.preemption import stopping_at_once

    index, count = _shard(options.shard)
    base = read_config_file(options.config, overrides)
    points = _points_of(options, base)
    runs = [
        Run(name_of(point), point, config.parse(with_overrides(base, point))) for point in points
    ]
    names = [run.name for run in runs]
    if len(set(names)) < len(names) or not names:
        raise UserError(
            f"--sweep {options.sweep} has no points, or two with the same name: {names}; make it return "
            f"distinct points"
        )
    stem = epath.Path(options.config.partition(":")[0]).stem
    folder = options.workdir or epath.Path("runs") / f"{stem}_{options.sweep}"
    keep_compiled_programs(options.cache)
    with stopping_at_once():
        failed = run_study(runs[index::count], folder)
    results = write_table(folder / "sweep.csv", runs)
    if results:
        names = without_shared_parts(list(results))
        named = dict(zip(names, results.values(), strict=True))
        write_bytes(folder / "sweep.png", png(study_figure(named), dpi=150))
    print(folder / "sweep.csv")
    if failed:
        listed = "; ".join(f"{name} ({why})" for name, why in failed.items())
        raise UserError(f"{len(failed)} of {len(runs[index::count])} points failed: {listed}")


def _compare(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.report.compare import write_comparison

    print(write_comparison(options.runs, options.out))


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"--shard is {text!r}; give I/N with I from 0 to N-1, such as 0/4")
    return int(match[1]), int(match[2])


def _points_of(options: argparse.Namespace, base: ConfigDict) -> list[Any]:
    """The points of a sweep: a function that the config file defines, or one of ABLATIONS.

    Raises UserError for another name, and for a function that isn't a sweep.
    """
    from guided_distill.experiments.sweeps import ABLATIONS

    file = find_config(options.config.partition(":")[0])
    defined = runpy.run_path(file, run_name=_CONFIG)
    own = {
        name: each
        for name, each in defined.items()
        if inspect.isfunction(each) and each.__module__ == _CONFIG and name != "get_config"
    }
    sweeps: dict[str, Any] = {**ABLATIONS, **own}
    if options.sweep not in sweeps:
        raise UserError(
            f"--sweep {options.sweep} is neither a function that {options.config} defines nor one of "
            f"{', '.join(ABLATIONS)}"
        )
    try:
        points = sweeps[options.sweep](base)
    except Exception as error:  # Whatever the user's own code raises.
        raise UserError(
            f"--sweep {options.sweep} fails: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(points, list) or not all(isinstance(each, Mapping) for each in points):
        raise UserError(
            f"--sweep {options.sweep} is not a sweep: it must return a list of points, such as `values` "
            f"returns"
        )
    return points
