"""The verbs of many runs: sweep, compare."""

import argparse
import re
import runpy
from typing import Any

from etils import epath

from guided_distill.errors import UserError
from guided_distill.verbs.runs import add_config, find_config, read_config
from guided_distill.verbs.shared import CACHE, command, keep_compiled_programs, workdir


def add_verbs(verbs: Any) -> None:
    """Adds them to the parser's verbs."""
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
        help="a function of the config file, or one of guided_distill.sweeps.ABLATIONS",
    )
    sweep.add_argument(
        "--workdir",
        type=workdir,
        help="the study's folder (default: runs/ and the names of config and sweep)",
    )
    sweep.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="run every N-th point, from the I-th, counted from 0: one shard a machine",
    )
    sweep.add_argument("--cache", **CACHE)

    compare = command(
        verbs,
        "compare",
        _compare,
        "write one page that puts runs side by side",
        "guided-distill compare runs/range/* --out compare.html",
    )
    compare.add_argument("runs", nargs="+", type=epath.Path, metavar="RUN", help="a run's folder")
    compare.add_argument(
        "--out",
        type=epath.Path,
        default=epath.Path("compare.html"),
        help="the page's file (default: %(default)s)",
    )


def _sweep(options: argparse.Namespace, overrides: list[str]) -> None:
    from guided_distill import config
    from guided_distill.pictures import png
    from guided_distill.report.studies import study_figure, without_shared_parts
    from guided_distill.storage import write_bytes
    from guided_distill.study import Run, run_study, write_table
    from guided_distill.sweeps import name_of, with_overrides
    from guided_distill.training.preemption import stopping_at_once

    index, count = _shard(options.shard)
    base = read_config(options.config, overrides)
    points = _find_sweep(options.config, options.sweep)(base)
    runs = [
        Run(name_of(point), point, config.parse(with_overrides(base, point))) for point in points
    ]
    names = [run.name for run in runs]
    if len(set(names)) < len(names) or not names:
        raise UserError(f"--sweep {options.sweep} has no points, or two of one name: {names}")
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
        told = "; ".join(f"{name} ({why})" for name, why in failed.items())
        raise UserError(f"{len(failed)} of {len(runs[index::count])} points failed: {told}")


def _compare(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.report.compare import write_comparison

    print(write_comparison(options.runs, options.out))


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"--shard is {text!r}; give I/N with I from 0 to N-1, such as 0/4")
    return int(match[1]), int(match[2])


def _find_sweep(config: str, name: str) -> Any:
    from guided_distill.sweeps import ABLATIONS

    own = runpy.run_path(find_config(config.partition(":")[0]))
    if name in ABLATIONS:
        return own.get(name, ABLATIONS[name])
    if name == "get_config" or not callable(own.get(name)):
        raise UserError(
            f"--sweep {name} is neither a function of {config} nor one of {', '.join(ABLATIONS)}"
        )
    return own[name]
