"""Folders of runs like those that training and evaluation write, made without running either."""

import dataclasses
import json

import numpy as np
from etils import epath

from guided_distill.config import parse
from guided_distill.evaluation.results import Result, write_results
from guided_distill.stages import all_stages
from guided_distill.storage import npz_bytes

ROW = Result(
    stage="teacher",
    sampler="ddim",
    num_steps=16,
    w=0.0,
    fd=1.0,
    kid=None,
    precision=0.5,
    recall=0.25,
    accuracy=0.75,
    n=64,
    seed=0,
    seconds=3.2,
    network_calls=32,
    extractor="classifier-64d",
)
WEIGHTS = (0.0, 1.0, 4.0)
CONFIG = {
    "halving": {"first_num_steps": 4},
    "evaluation": {"weights": WEIGHTS, "teacher_num_steps": (16,), "num_samples": 64},
}


def rows_of(*, fd, **changes):
    """Rows of the teacher, stage one, and students of 4, 2 and 1 steps; distances start at `fd`."""
    rows = [dataclasses.replace(ROW, w=w, fd=fd + w, **changes) for w in WEIGHTS]
    stage_one = {"stage": "guidance", "num_steps": 8, "network_calls": 8, "seconds": 0.8}
    rows += [dataclasses.replace(ROW, w=w, fd=fd + w, **(stage_one | changes)) for w in WEIGHTS]
    for n in (4, 2, 1):
        student = {"stage": "halving", "num_steps": n, "network_calls": n, "seconds": 0.1 * n}
        rows += [
            dataclasses.replace(ROW, w=w, fd=fd + w + 1 / n, **(student | changes)) for w in WEIGHTS
        ]
    return rows


def make_run(folder, *, results, config=None, side=4, skipped=0):
    """Write a run: its config, logs, results, samples of every row, and paths of some rows."""
    workdir = epath.Path(folder)
    (workdir / "samples").mkdir(parents=True)
    values = CONFIG | (config or {})
    experiment = parse(values)
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(experiment)))
    for stage in all_stages(experiment):
        (workdir / stage.name / "checkpoints" / str(stage.total_steps)).mkdir(parents=True)
        line = {"step": stage.total_steps, "loss": 0.5, "skipped": skipped}
        (workdir / stage.name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    write_results(workdir / "results.csv", results)
    rng = np.random.default_rng(0)
    for row in results:
        if row.num_steps is not None:
            images = rng.uniform(-1, 1, (10, side, side, 1))
            arrays = npz_bytes(image=images, label=np.arange(10))
            (workdir / "samples" / f"{row.file_stem}.npz").write_bytes(arrays)
            if row.w == WEIGHTS[1]:
                steps = min(8, row.num_steps)
                x = rng.uniform(-1, 1, (steps, 2, side, side, 1))
                path = npz_bytes(x=x, t=1 - np.arange(steps) / steps, label=np.arange(2))
                (workdir / "samples" / f"{row.file_stem}_path.npz").write_bytes(path)
    return workdir
