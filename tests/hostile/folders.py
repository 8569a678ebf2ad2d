"""Complete folders of runs and models, made once and without training."""

import json

import jax
import numpy as np
import tiny
from etils import epath
from run_folder import make_run, rows_of

from guided_distill import cli
from guided_distill.config import parse
from guided_distill.runs.trained import Description
from guided_distill.stages import all_stages
from guided_distill.training.checkpoints import StageCheckpoints

CONFIG = {
    "model": {"name": "mlp", "options": {"width": 8, "depth": 1, "embedding_width": 8}},
    "halving": {"first_num_steps": 4, "samplers": ("ddim", "encode")},
}


def write_run(folder):
    """Write a finished and evaluated run on the digits; the weights of its stages are constant."""
    workdir = make_run(folder, results=rows_of(fd=1.0), config=CONFIG, side=8)
    experiment = parse(json.loads((workdir / "config.json").read_text()))
    for stage in all_stages(experiment):
        about = Description(
            stage=stage.kind,
            total_steps=stage.total_steps,
            num_steps=stage.num_steps,
            sampler=stage.sampler,
            w_min=experiment.guidance.w_min if stage.takes_w else None,
            w_max=experiment.guidance.w_max if stage.takes_w else None,
            data_shape=(8, 8, 1),
            class_names=tuple(map(str, range(10))),
            teacher=None,
            package_version="0",
            experiment=experiment,
        )
        (workdir / stage.name / "checkpoints" / str(stage.total_steps)).rmdir()
        save(workdir / stage.name, about)
    return workdir


def save(directory, about):
    """Save a checkpoint whose weights are all equal."""
    shapes = jax.eval_shape(about.network().init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), shapes)
    with StageCheckpoints(directory) as checkpoints:
        checkpoints.save_result(about.total_steps, params, about=about.to_json())
        checkpoints.wait()


def write_text_run(folder):
    """Write a run of an imported text-conditioned teacher and a student of four steps."""
    folder = epath.Path(folder)
    tiny.write_pipeline(folder / "pipeline")
    source, workdir = folder / "pipeline", folder / "run"
    assert cli.main(["import", "--from", str(source), "--workdir", str(workdir)]) == 0
    tiny.add_student(workdir, sampler="ddim", num_steps=4)
    return workdir
