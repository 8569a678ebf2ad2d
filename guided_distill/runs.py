"""A run's folder: its config, and which of its stages are finished. Nothing here trains or draws."""

import json

from etils import epath

from guided_distill.config import Experiment, parse_recorded
from guided_distill.diffusion.samplers import ENCODE
from guided_distill.errors import UserError
from guided_distill.stages import Stage, all_stages
from guided_distill.storage import first_line, is_there
from guided_distill.training.checkpoints import latest_step


def is_finished(workdir: epath.Path, stage: Stage) -> bool:
    """Whether the run has the stage's last checkpoint, without opening it."""
    return latest_step(workdir / stage.name) == stage.total_steps


def read_config(workdir: epath.Path) -> Experiment:
    """The config of a run. Raises UserError if the folder holds none."""
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


def last_finished(workdir: epath.Path) -> str:
    """The folder of the last finished stage that samples. Raises UserError if there is none."""
    return finished_samplers(workdir)[-1]


def finished_samplers(workdir: epath.Path) -> list[str]:
    """Folders of the finished stages that sample, in the order of training.

    Raises UserError if there is none.
    """
    encoders = {stage.name for stage in all_stages(read_config(workdir)) if stage.sampler == ENCODE}
    names = [name for name in finished_stages(workdir) if name not in encoders]
    if not names:
        raise UserError(f"{workdir} has no finished stage: run `guided-distill train` on it first")
    return names
