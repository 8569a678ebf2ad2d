"""A run's folder: its config, and which of its stages are finished. Nothing here trains or draws."""

import json

from etils import epath

from guided_distill.config import Experiment, parse_recorded
from guided_distill.diffusion.samplers import ENCODE
from guided_distill.errors import UserError
from guided_distill.stages import Stage, all_stages
from guided_distill.storage import first_line, is_there
from guided_distill.training.checkpoints import latest_step
from guided_distill.training.model_file import is_model_file


def is_finished(workdir: epath.Path, stage: Stage) -> bool:
    """Whether the run has the stage's last checkpoint, without opening it."""
    return latest_step(workdir / stage.name) == stage.total_steps


def read_config(workdir: epath.Path) -> Experiment:
    """The config of a run. Raises UserError if the folder holds none."""
    if is_model_file(workdir):
        raise UserError(
            f"{workdir} is one model's file, and this takes a run's folder: make one of it by "
            f"`guided-distill export --workdir {workdir} --out FOLDER`"
        )
    path = workdir / "config.json"
    if not is_there(path):
        raise UserError(
            f"{workdir} holds no run (config.json is missing): give the --workdir of a "
            f"`guided-distill train`"
        )
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({first_line(error)}): remove it, and run `guided-distill train` with "
            f"the run's --config, which writes it anew"
        ) from error
    return parse_recorded(values)


def finished_stages(workdir: epath.Path) -> list[str]:
    """Folders of the run's finished stages, in the order of training, without opening them."""
    return [stage.name for stage in all_stages(read_config(workdir)) if is_finished(workdir, stage)]


def folder_of(workdir: epath.Path) -> epath.Path:
    """Where companions and results lie: the run's folder, or the folder of a model's file."""
    return workdir.parent if is_model_file(workdir) else workdir


def stage_to_sample(workdir: epath.Path, stage: str | None) -> epath.Path:
    """Where the model to sample from lies.

    workdir: a run's folder, in which `stage` names a stage's folder, None for the last finished one that
    samples; or a model's file. Raises UserError if there is none, or for a stage of a file.
    """
    if not is_model_file(workdir):
        return workdir / (stage or finished_samplers(workdir)[-1])
    if stage is not None:
        raise UserError(f"--stage is {stage}, but {workdir} is one model's file: leave it out")
    return workdir


def finished_samplers(workdir: epath.Path) -> list[str]:
    """Folders of the finished stages that sample, in the order of training.

    Raises UserError if there is none.
    """
    encoders = {stage.name for stage in all_stages(read_config(workdir)) if stage.sampler == ENCODE}
    names = [name for name in finished_stages(workdir) if name not in encoders]
    if not names:
        raise UserError(f"{workdir} has no finished stage: run `guided-distill train` on it first")
    return names
