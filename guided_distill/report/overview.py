"""The runs below a folder, how far each is, and its last numbers: `guided-distill runs`.

All of it is read from small files, without JAX, so that the table appears at once.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from etils import epath
from rich.console import JustifyMethod
from rich.table import Table

from guided_distill.errors import UserError
from guided_distill.evaluation.tables import read_rows
from guided_distill.runs.files import CONFIG, read_config_values, read_stages
from guided_distill.storage import age, is_held, is_there, storing
from guided_distill.training.record import latest_step, read_metrics

DEPTH = 3
"""How many levels of folders below the given one can hold runs."""

_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


@dataclass(frozen=True)
class Measured:
    """Some columns of a row of results.csv; `Result` has all, and imports JAX."""

    stage: str
    sampler: str | None
    num_steps: int | None
    w: float | None
    fd: float
    n: int
    extractor: str


@dataclass(frozen=True)
class Overview:
    """How far a run is.

    data: the name of its data. totals, done: the updates of each stage, in the order of training, and
    how many of them are made. left: the unfinished stages. loss: the last logged one. measured: the last
    row of results.csv. seconds: since the run was last written. training: whether a process trains there
    now.
    """

    data: str
    totals: Mapping[str, int]
    done: Mapping[str, int]
    left: Sequence[str]
    loss: float | None
    measured: Measured | None
    seconds: float
    training: bool


def find_runs(folder: epath.Path) -> Iterator[epath.Path]:
    """The folders of runs in `folder`, at most DEPTH levels below it, without those within a run.

    A folder that holds a stage but no config is one too: the rest of an interrupted import, or damage.
    Raises UserError if `folder` doesn't exist.
    """
    if not is_there(folder) or not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder that holds the runs")
    return _runs_in(folder, DEPTH)


def _runs_in(folder: epath.Path, depth: int) -> Iterator[epath.Path]:
    try:
        within = sorted(each for each in folder.iterdir() if not each.name.startswith("."))
    except PermissionError:
        return
    if folder / CONFIG in within:
        yield folder
        return
    folders = [each for each in within if each.is_dir()]
    if any((each / "checkpoints").is_dir() for each in folders):
        yield folder
    elif depth:
        for each in folders:
            yield from _runs_in(each, depth - 1)


def overview(workdir: epath.Path) -> Overview | None:
    """How far a run is; None for a folder whose config.json is another program's.

    Raises UserError if a file of the run is missing or damaged, or can't be read.
    """
    with storing(workdir, verb="read"):
        return _overview(workdir)


def _overview(workdir: epath.Path) -> Overview | None:
    config = read_config_values(workdir)
    data = config.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        return None
    totals = read_stages(workdir) or _stages_of_config(workdir)
    saved = {name: latest_step(workdir / name) for name in totals}
    done = {name: saved[name] or 0 for name in totals}
    left = [name for name in totals if saved[name] != totals[name]]
    begun = [name for name in totals if is_there(workdir / name)]
    # The stage in training, or else the last one.
    shown = [*(name for name in left if name in begun), *begun[-1:]][:1]
    log = [row for name in shown for row in read_metrics(workdir / name)]
    if log:
        done[shown[0]] = min(totals[shown[0]], max(done[shown[0]], log[-1]["step"]))
    results = read_rows(workdir / "results.csv", Measured)
    files = (CONFIG, "results.csv", *(f"{name}/metrics.jsonl" for name in shown))
    return Overview(
        data=data["name"].rstrip("/").rpartition("/")[2],
        totals=totals,
        done=done,
        left=left,
        loss=next((row["loss"] for row in reversed(log) if row.get("loss") is not None), None),
        measured=results[-1] if results else None,
        seconds=min(age(workdir / name) for name in files if is_there(workdir / name)),
        training=is_held(workdir),
    )


def _stages_of_config(workdir: epath.Path) -> dict[str, int]:
    """The stages of a run of an earlier version, which didn't record them."""
    # Here, because these import JAX.
    from guided_distill.runs.folder import read_config
    from guided_distill.stages import all_stages, updates_of

    experiment = read_config(workdir)
    stages = updates_of(experiment, all_stages(experiment))
    if experiment.start_from:
        # The stages before the first one here belong to another run.
        begun = itertools.dropwhile(lambda name: not is_there(workdir / name), stages)
        return {name: stages[name] for name in begun} or stages
    return stages


def runs_table(runs: Mapping[str, Overview]) -> Table:
    """A table with a row for each run, by its name."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "data", "stages", "now", "updates", "loss", "measured last", "written"):
        right = name in ("stages", "updates", "loss", "written")
        side: JustifyMethod = "right" if right else "left"
        table.add_column(name, justify=side, no_wrap=right, overflow="fold")
    for name, run in runs.items():
        table.add_row(name, *_cells(run))
    return table


def _cells(run: Overview) -> Sequence[str]:
    return (
        run.data,
        f"{len(run.totals) - len(run.left)}/{len(run.totals)}",
        _now(run),
        f"{sum(run.done.values()):,}/{sum(run.totals.values()):,}",
        "" if run.loss is None else f"{run.loss:.3g}",
        "" if run.measured is None else _figures(run.measured),
        _ago(run.seconds),
    )


def _now(run: Overview) -> str:
    """The stage that is next or in training, and its updates."""
    if not run.left:
        return "finished"
    stage = run.left[0]
    place = f"{stage} {run.done[stage]:,}/{run.totals[stage]:,}"
    return f"training {place}" if run.training else f"stopped at {place}"


def _figures(row: Measured) -> str:
    of = (row.stage, row.sampler, row.num_steps and f"N={row.num_steps}")
    w = None if row.w is None else f"w={row.w:g}"
    words = " ".join(str(each) for each in (*of, w) if each)
    return f"fd {row.fd:.3g}: {words}, n={row.n}, {row.extractor}"


def _ago(seconds: float) -> str:
    size, unit = next((each for each in _UNITS if seconds >= each[0]), _UNITS[-1])
    return f"{max(seconds, 0) / size:.0f} {unit} ago"
