"""A run's folder: its config, the check that it belongs to a config, and its finished stages."""

import dataclasses
import json
from functools import partial

import jax
from etils import epath

from guided_distill.config import Experiment, changed_keys, parse_recorded
from guided_distill.diffusion.samplers import ENCODE
from guided_distill.errors import UserError
from guided_distill.objectives.stage import Stage
from guided_distill.places import path_named
from guided_distill.runs.files import CONFIG, read_config_values
from guided_distill.runs.model_file import is_model_file
from guided_distill.stages import all_stages, chains
from guided_distill.storage import check_writable, is_there, persistently, write_text
from guided_distill.training.record import latest_step


def is_finished(workdir: epath.Path, stage: Stage) -> bool:
    """Whether the run has the last checkpoint of the stage, which isn't opened."""
    return latest_step(workdir / stage.name) == stage.total_steps


def read_config(workdir: epath.Path) -> Experiment:
    """The config of a run. Raises UserError if the folder holds none."""
    if is_model_file(workdir):
        raise UserError(
            f"{workdir} is the file of one model, but a run's folder is needed: make one with "
            f"`guided-distill export --workdir {workdir} --out FOLDER`"
        )
    return parse_recorded(read_config_values(workdir))


def finished_stages(workdir: epath.Path) -> list[str]:
    """Folders of the finished stages in the order of training; their checkpoints aren't opened."""
    return [stage.name for stage in all_stages(read_config(workdir)) if is_finished(workdir, stage)]


def folder_of(workdir: epath.Path) -> epath.Path:
    """The folder of companions and results: the run's folder, or the folder that holds a model's file."""
    return workdir.parent if is_model_file(workdir) else workdir


def stage_to_sample(workdir: epath.Path, stage: str | None) -> epath.Path:
    """The path of the model to sample from.

    workdir: a model's file, or a run's folder, in which `stage` names a stage's folder; None selects the
    last finished stage that samples. Raises UserError if there is none, or if a file is given a stage.
    """
    if not is_model_file(workdir):
        return workdir / (stage or finished_samplers(workdir)[-1])
    if stage is not None:
        raise UserError(
            f"--stage is {stage}, but {workdir} is the file of one model: leave --stage out"
        )
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


def claim(workdir: epath.Path, experiment: Experiment) -> None:
    """Write the config to the workdir. Raises UserError if it already holds a different one."""
    check_unclaimed(workdir, experiment)
    write_text(workdir / CONFIG, json.dumps(dataclasses.asdict(experiment), indent=2))


def check_unclaimed(workdir: epath.Path, experiment: Experiment) -> None:
    """Raises UserError if the workdir's config differs in a key that changes the trained weights.

    start_from and teacher.initial may name the same stage differently, or one that has moved, and don't
    matter once the run has a result.
    """
    if is_there(workdir / CONFIG):
        changes = changed_keys(read_config(workdir), experiment)
        needed = bool(unbegun(workdir, experiment))
        for key in ("start_from", "teacher.initial"):
            old, new = changes.get(key, (None, None))
            if old and new and not (needed and _differ(path_named(old), path_named(new))):
                del changes[key]
        if changes:
            listed = "; ".join(
                f"config.{key} is {old!r} there and {new!r} here"
                for key, (old, new) in changes.items()
            )
            raise UserError(
                f"{workdir} belongs to another config ({listed}): choose another --workdir, or give "
                f"the same values to resume"
            )


def _differ(old: epath.Path, new: epath.Path) -> bool:
    """Whether two paths name different stages; a missing one may have been moved to the other."""
    return is_there(old) and old.resolve() != new.resolve()


def check_shared(workdir: epath.Path) -> None:
    """Raises UserError unless this process sees the run's folder and can write to it."""
    if not is_there(workdir / CONFIG):
        raise UserError(
            f"process {jax.process_index()} doesn't see {workdir}, which process 0 wrote: give a "
            f"--workdir that all processes share"
        )
    persistently(partial(check_writable, workdir), workdir)


def unbegun(workdir: epath.Path, experiment: Experiment) -> list[list[Stage]]:
    """The chains without a finished stage. Only they need the model that the run starts from."""
    return [
        chain
        for chain in chains(experiment)
        if not any(is_finished(workdir, stage) for stage in chain)
    ]
