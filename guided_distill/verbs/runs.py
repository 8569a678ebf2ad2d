"""The verbs of a run: plan, train, evaluate, report, and runs, which lists them."""

import argparse
import contextlib
import importlib.resources
import json
import runpy
import sys
from collections.abc import Iterator
from typing import Any

import ml_collections
from absl import flags
from etils import epath
from ml_collections import config_flags

from guided_distill import kinds
from guided_distill.errors import UserError
from guided_distill.places import path_named
from guided_distill.verbs.shared import (
    CACHE,
    add_process_arguments,
    check_same_options,
    command,
    command_of_run,
    keep_compiled_programs,
    number,
    path,
    several,
    stage_folder,
)


def add_verbs(verbs: Any) -> None:
    """Add these verbs to the parser."""
    plan = command(
        verbs,
        "plan",
        _plan,
        "compile a config's stages for TPUs you don't have yet, and report memory, FLOPs and hours",
        "guided-distill plan --config configs/cifar10.py --stage halving --topology v5e:4x4",
    )
    add_config(plan)
    plan.add_argument(
        "--topology",
        required=True,
        help="TPU generation and sides of the slice: v5e:4x4, v6e:4x4, v4:2x2x4, v5p:2x2x1, 7x:2x2x1",
    )
    plan.add_argument(
        "--slices",
        type=number(kinds.Width),
        default=1,
        help="number of slices; weights are sharded within each slice, the batch over all slices "
        "(default: %(default)s)",
    )
    plan.add_argument(
        "--stage",
        default="all",
        help="teacher, guidance, halving, sampling (one call of the student, and sampling in N steps) "
        "or all (default: %(default)s)",
    )
    plan.add_argument(
        "--optimization_level",
        default="O0",
        choices=("O0", "O1", "O2", "O3"),
        help="optimization level of the compiler; O0 is by far the fastest (default: %(default)s)",
    )
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    plan.add_argument("--cache", **CACHE)

    train = command(
        verbs,
        "train",
        _train,
        "train the teacher and distill it, stage by stage; run again to resume",
        "guided-distill train --config configs/digits.py --workdir runs/digits "
        "--config.teacher.steps=100",
    )
    add_config(train)
    train.add_argument(
        "--workdir",
        type=path,
        help="the run's folder (default: runs/NAME for the config NAME.py)",
    )
    train.add_argument(
        "--profile",
        type=number(kinds.Count),
        metavar="UPDATES",
        help="write a trace of so many updates of the first stage that is trained, for TensorBoard and "
        "Perfetto",
    )
    train.add_argument(
        "--wandb",
        metavar="PROJECT",
        help="send the log to a project of Weights & Biases; without a key, it is kept to be sent later",
    )
    train.add_argument("--cache", **CACHE)
    add_process_arguments(train)

    evaluate = command_of_run(
        verbs,
        "evaluate",
        _evaluate,
        "measure every stage and write results.csv; run again to resume",
        "guided-distill evaluate --workdir runs/digits --extractor lite0 --num_samples 10000",
    )
    evaluate.add_argument(
        "--extractor",
        help="classifier (trained on the run's data), lite0, lite0:PATH, inception:PATH, or clip:PATH, "
        "which adds the CLIP score if the run is conditioned on text (default: as in the run's config)",
    )
    evaluate.add_argument(
        "--num_samples",
        type=number(kinds.Count),
        help="samples per row (default: as in the run's config)",
    )
    evaluate.add_argument(
        "--w",
        type=several(number(kinds.Weight)),
        help="guidance weights, separated by commas (default: as in the run's config)",
    )
    evaluate.add_argument(
        "--stages",
        type=several(stage_folder),
        help="folders of stages in the workdir, separated by commas (default: all)",
    )
    evaluate.add_argument(
        "--num_steps",
        type=several(number(kinds.NumSteps)),
        help="the teacher's numbers of steps, separated by commas (default: as in the run's config)",
    )
    evaluate.add_argument(
        "--against_teacher",
        type=number(kinds.NumSteps),
        metavar="NUM_STEPS",
        help="compare with the teacher's samples in this many DDIM steps too, in the columns fd_teacher, "
        "kid_teacher and rmse_teacher (default: as in the run's config)",
    )
    evaluate.add_argument(
        "--reference",
        type=path,
        help="an .npz file of the statistics to compare with (default: those of the training data)",
    )
    evaluate.add_argument(
        "--again", action="store_true", help="measure again the rows that results.csv already holds"
    )
    evaluate.add_argument("--cache", **CACHE)
    add_process_arguments(evaluate)

    command_of_run(
        verbs,
        "report",
        _report,
        "write report.html, a page that shows the whole run",
        "guided-distill report --workdir runs/digits",
    )

    runs = command(
        verbs,
        "runs",
        _runs,
        "list the runs below a folder: how far each is, and its last numbers",
        "guided-distill runs",
    )
    runs.add_argument(
        "folder",
        nargs="?",
        metavar="DIR",
        type=path,
        default=epath.Path("runs"),
        help="the folder that holds the runs, which can be in a bucket (default: %(default)s)",
    )


def add_config(verb: argparse.ArgumentParser) -> None:
    """Add the flag --config."""
    verb.add_argument(
        "--config",
        required=True,
        help="a config file, or FILE:VARIANT; --config.KEY=VALUE overrides a key, and "
        "`guided-distill config show FILE` lists the keys",
    )


# Each verb imports what it needs when it runs, so that --help and errors in flags are immediate.


def _plan(options: argparse.Namespace, overrides: list[str]) -> None:
    from rich.console import Console

    from guided_distill import config
    from guided_distill.plan.plan import make_plans
    from guided_distill.plan.topologies import find_topology
    from guided_distill.report.plans import lines_under, plan_json, plan_table
    from guided_distill.run_data import outline_for
    from guided_distill.training.preemption import stopping_at_once

    experiment = config.parse(read_config_file(options.config, overrides))
    topology = find_topology(options.topology, slices=options.slices)
    level = options.optimization_level
    with stopping_at_once():
        plans = make_plans(
            experiment,
            outline_for(experiment),
            topology,
            stage=options.stage,
            level=level,
            cache=options.cache / "plans",
        )
    if options.json:
        print(json.dumps(plan_json(plans, topology, level=level), indent=2))
        return
    console = Console(width=max(100, Console().width))
    console.print(plan_table(plans, topology, level=level))
    for line in lines_under(plans):
        console.print(line, highlight=False, markup=False)


def _train(options: argparse.Namespace, overrides: list[str]) -> None:
    from guided_distill import config, pipeline
    from guided_distill.training.job import Monitoring
    from guided_distill.training.preemption import stopping_at_once
    from guided_distill.training.processes import connected, is_first, together
    from guided_distill.training.wandb_log import sign_in

    keep_compiled_programs(options.cache)
    with connected(timeout=options.start_timeout), stopping_at_once():
        check_same_options(options)
        with together():
            experiment = config.parse(read_config_file(options.config, overrides))
            project = sign_in(options.wandb) if options.wandb is not None and is_first() else None
        pipeline.run(
            experiment,
            options.workdir or _default_workdir(options.config),
            Monitoring(profile=options.profile, wandb=project),
        )


def _evaluate(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.evaluation.evaluate import evaluate
    from guided_distill.evaluation.tasks import Selection
    from guided_distill.training.preemption import stopping_at_once
    from guided_distill.training.processes import connected, is_first

    keep_compiled_programs(options.cache)
    with connected(timeout=options.start_timeout), stopping_at_once():
        check_same_options(options)
        request = Selection(
            extractor=options.extractor,
            num_samples=options.num_samples,
            weights=options.w,
            stages=options.stages,
            num_steps=options.num_steps,
            against_teacher=options.against_teacher,
            reference=options.reference,
            again=options.again,
        )
        evaluate(options.workdir, request)
        if is_first():
            print(options.workdir / "results.csv")


def _report(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.report.page import write_report

    print(write_report(options.workdir))


def _runs(options: argparse.Namespace, _: list[str]) -> None:
    from rich.console import Console

    from guided_distill.report.overview import find_runs, overview, runs_table

    runs, broken = {}, []
    for found in find_runs(options.folder):
        name = str(found.relative_to(options.folder))
        try:
            if run := overview(found):
                runs[name] = run
        except UserError as error:
            broken.append(f"{name}: {' '.join(str(error).split())}")
    if runs:
        # Rows that another program reads have one line each.
        console = Console(width=None if sys.stdout.isatty() else 1000)
        console.print(runs_table(runs), highlight=False, markup=False)
    for line in broken or ([] if runs else [f"no runs below {options.folder}"]):
        print(line)


def _default_workdir(config: str) -> epath.Path:
    """Return runs/NAME for NAME.py, and runs/NAME_VARIANT for NAME.py:VARIANT."""
    file, _, variant = config.partition(":")
    return epath.Path("runs") / "_".join([epath.Path(file).stem, *filter(None, variant.split(","))])


def find_config(file: str) -> str:
    """Find a config file: the path itself, the package's copy, or the one beside the package in a clone.

    Raises UserError if there is none.
    """
    package = epath.Path(str(importlib.resources.files("guided_distill")))
    for found in (path_named(file), package / file, package.parent / file):
        if found.is_file():
            return str(found)
    raise UserError(f"--config names {file}, which is not a file: try configs/digits.py")


def read_config_file(path: str, overrides: list[str]) -> ml_collections.ConfigDict:
    """Read the ConfigDict of FILE or FILE:VARIANT and apply each override --config.KEY=VALUE.

    Values are parsed as ml_collections does; for a key that may be None, the value None means None.
    """
    from guided_distill.config import Experiment

    if "://" in path:
        raise UserError(f"--config {path} is not on this machine: copy the file to it")
    named, _, variant = path.partition(":")
    file = find_config(named)
    try:
        config = runpy.run_path(file)["get_config"](variant)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # Whatever the user's own code raises.
        raise UserError(
            f"--config {path} can't be read: {type(error).__name__}: {error}"
        ) from error
    arguments = ["guided-distill"]
    without: dict[str, None] = {}
    for override in overrides:
        key, _, value = override.removeprefix("--config.").partition("=")
        _check_key(config, key, file)
        kind = kinds.kind_at(key, Experiment)
        if value == "None" and kinds.without_none(kind) is not kind:
            without[key] = None
        else:
            arguments.append(override)
    values = flags.FlagValues()
    with _command_line(arguments):
        try:
            config_flags.DEFINE_config_dict("config", config, flag_values=values)
            values(arguments)
        except (flags.Error, TypeError, ValueError) as error:
            raise UserError(f"an override doesn't fit {file}: {error}") from error
    config.update_from_flattened_dict(without)
    return config


def _check_key(config: ml_collections.ConfigDict, key: str, file: str) -> None:
    section: Any = config
    for name in key.split("."):
        keys = list(section) if isinstance(section, ml_collections.ConfigDict) else []
        if name not in keys:
            remedy = f"in place of {name}, choose one of {', '.join(keys)}"
            raise UserError(
                f"config.{key} is not a key of {file}; {remedy if keys else f'leave out .{name}'}"
            )
        section = section[name]


@contextlib.contextmanager
def _command_line(arguments: list[str]) -> Iterator[None]:
    # config_flags looks for overrides in sys.argv itself.
    saved, sys.argv = sys.argv, arguments
    try:
        yield
    finally:
        sys.argv = saved
