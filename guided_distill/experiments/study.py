"""A study: a run for each point of a sweep, one after the other, and a table of their results."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import jax
from etils import epath

from guided_distill import pipeline
from guided_distill.config import SECOND_STAGES, Experiment, changed_keys
from guided_distill.errors import Interrupted, UserError
from guided_distill.evaluation.comparison import comparable
from guided_distill.evaluation.evaluate import evaluate
from guided_distill.evaluation.results import COLUMNS, Result, read_results
from guided_distill.experiments.sweeps import Point
from guided_distill.runs import folder as runs
from guided_distill.storage import write_text
from guided_distill.training.progress import console
from guided_distill.training.record import latest_step

DONE = "done.json"
"""A file in the folder of a finished point: the config that it was trained and measured with."""

_AFTER_THE_TEACHER = ("start_from", "method", "second_stage", "guidance", *SECOND_STAGES)
"""Keys of a config that don't affect its teacher."""


@dataclass(frozen=True)
class Run:
    """A point: its name (also that of its folder in the study), its overrides, and the whole config."""

    name: str
    point: Point
    experiment: Experiment


def run_study(runs: Sequence[Run], folder: epath.Path) -> dict[str, str]:
    """Train and measure each run, resuming where it stopped; finished runs are skipped.

    If two runs have the same teacher, the later run starts from the earlier one's. If a run fails, the
    next one starts. Returns the errors of failed runs by name. Raises Interrupted as training does.
    """
    failed: dict[str, str] = {}
    for index, run in enumerate(runs):
        workdir = folder / run.name
        place = f"{index + 1}/{len(runs)} {run.name}"
        experiment = _with_teacher(run, runs[:index], folder)
        done, wanted = workdir / DONE, json.dumps(asdict(experiment))
        if done.exists() and done.read_text() == wanted:
            console.print(f"{place} is done", highlight=False, markup=False)
            continue
        console.print(place, highlight=False, markup=False)
        try:
            pipeline.run(experiment, workdir)
            evaluate(workdir)
            write_text(done, wanted)
        except (Interrupted, KeyboardInterrupt):
            raise
        except Exception as error:  # Whatever it is, the other points can still run.
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            failed[run.name] = f"{kind}{error}"
            console.print(f"{run.name} failed: {failed[run.name]}", highlight=False, markup=False)
        # Compiled programs of finished points aren't used again.
        jax.clear_caches()
    return failed


def _with_teacher(run: Run, earlier: Sequence[Run], folder: epath.Path) -> Experiment:
    """The run's config, set to start from an earlier run's teacher if that is the same."""
    experiment = run.experiment
    if (folder / run.name / "config.json").exists():
        begun = runs.read_config(folder / run.name)
        return replace(experiment, start_from=begun.start_from)
    if experiment.start_from or experiment.autoencoder.steps:
        return experiment
    for other in earlier:
        teacher = folder / other.name / "teacher"
        changed = changed_keys(other.experiment, experiment)
        alike = all(key.split(".")[0] in _AFTER_THE_TEACHER for key in changed)
        if alike and latest_step(teacher) == experiment.teacher.steps:
            return replace(experiment, start_from=str(teacher))
    return experiment


def measured(runs: Sequence[Run], folder: epath.Path) -> dict[str, list[Result]]:
    """The rows of each evaluated run by name, of one extractor and number of samples."""
    return {
        run.name: comparable(found, run.experiment.evaluation.extractor)
        for run in runs
        if (found := read_results(folder / run.name / "results.csv"))
    }


def write_table(path: epath.Path, runs: Sequence[Run]) -> dict[str, list[Result]]:
    """Write the `measured` rows of the file's folder, each after its run's name and overrides.

    Shards share the file. If another shard adds rows during a write, the file is written again, so that
    it holds all rows whichever shard ends last.
    """
    written = None
    while (text := _table(runs, results := measured(runs, path.parent))) != written:
        write_text(path, text)
        written = text
    return results


def _table(runs: Sequence[Run], results: Mapping[str, Sequence[Result]]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.point))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["point", *keys, *COLUMNS], lineterminator="\n")
    writer.writeheader()
    for run in runs:
        for result in results.get(run.name, ()):
            writer.writerow({"point": run.name} | dict(run.point) | asdict(result))
    return text.getvalue()
