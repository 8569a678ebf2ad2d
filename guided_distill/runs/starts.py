"""Runs that start from the result of another run: config.start_from and config.teacher.initial."""

from typing import Any

from etils import epath

from guided_distill.config import SECOND_STAGES, STAGES, Experiment
from guided_distill.data.source import Source
from guided_distill.errors import UserError
from guided_distill.formats.companions import bring_companions
from guided_distill.models.registry import Network
from guided_distill.objectives.stage import SecondStage, Stage
from guided_distill.places import path_named
from guided_distill.runs.folder import is_finished, unbegun
from guided_distill.runs.trained import Description, read_finished
from guided_distill.stages import chains

_Pairs = dict[str, tuple[Any, Any]]
"""{name: (its value there, the value needed here)}."""


def check_starts(
    workdir: epath.Path, experiment: Experiment, source: Source, network: Network
) -> None:
    """Raises UserError if a chain that hasn't begun can't start from the model that the config names.

    network: the network of the run's teacher, for the data of `source`.
    """
    chains = unbegun(workdir, experiment)
    if chains and (path := experiment.teacher.initial):
        about = read_finished(path_named(path))
        if about.stage != "teacher":
            raise UserError(
                f"config.teacher.initial={path} is a {about.stage} stage: give a teacher"
            )
        _check_same("teacher.initial", path, _differences(about, source, network))
    if chains and (path := experiment.start_from):
        about = read_finished(path_named(path))
        for chain in chains:
            fixed = _differences(about, source, network) | _distilled(about, experiment, chain)
            _check_same("start_from", path, fixed)


def bring_from_origins(workdir: epath.Path, experiment: Experiment) -> None:
    """Copy the companions of the runs that the experiment starts from, unless it has already begun."""
    for origin in (experiment.start_from, experiment.teacher.initial):
        if origin and unbegun(workdir, experiment):
            bring_companions(path_named(origin).parent, workdir)


def chains_to_train(workdir: epath.Path, experiment: Experiment) -> list[tuple[list[Stage], bool]]:
    """The part of each chain that this run trains, and whether it starts from config.start_from."""
    if experiment.start_from is None:
        return [(chain, False) for chain in chains(experiment)]
    fresh = unbegun(workdir, experiment)
    parts = []
    for chain in chains(experiment):
        if chain in fresh:
            kind = read_finished(path_named(experiment.start_from)).stage
            parts.append((_left_after(kind, chain), True))
        else:
            # The stages before the first finished one belong to another run.
            finished = [is_finished(workdir, stage) for stage in chain]
            parts.append((chain[finished.index(True) :], False))
    return parts


def _left_after(kind: str, chain: list[Stage]) -> list[Stage]:
    """The stages of a chain that follow a stage of another run; all students follow any student."""
    after = SECOND_STAGES if kind in SECOND_STAGES else STAGES[STAGES.index(kind) + 1 :]
    return [stage for stage in chain if stage.kind in after]


def _differences(about: Description, source: Source, network: Network) -> _Pairs:
    """The properties of a network that must equal those of this run's teacher."""
    theirs = {
        **about.network().options,
        "data_shape": about.data_shape,
        "condition": dict(about.condition_shapes),
        "number of classes": len(about.class_names),
    }
    ours = {
        **network.options,
        "data_shape": source.shape,
        "condition": dict(source.condition_shapes),
        "number of classes": source.num_classes,
    }
    return {name: (theirs.get(name), needed) for name, needed in ours.items()}


def _distilled(about: Description, ours: Experiment, chain: list[Stage]) -> _Pairs:
    """The settings that a distillation shares with the stage that it starts from."""
    theirs = about.experiment
    same: _Pairs = {
        key: (getattr(about.model, key), getattr(ours.model, key))
        for key in ("parameterization", "schedule", "schedule_options")
    }
    if about.stage != "teacher":
        same["method"] = (theirs.method, ours.method)
    if about.w_min is not None:
        same["w range"] = ((about.w_min, about.w_max), ours.guidance.w_range)
        same["w_embedding"] = (theirs.guidance.w_embedding, ours.guidance.w_embedding)
    if about.stage in SECOND_STAGES:
        first = _left_after(about.stage, chain)[0]
        if isinstance(first, SecondStage):
            steps = first.teacher_num_steps
            needed = (first.sampler, steps) if steps else "a stage trained at every t"
            same["sampler and num_steps"] = ((about.sampler, about.num_steps), needed)
    return same


def _check_same(key: str, path: str, pairs: _Pairs) -> None:
    for name, (theirs, needed) in pairs.items():
        if theirs != needed:
            raise UserError(
                f"config.{key}={path} has {name} {theirs}, but this run needs {needed}: "
                f"start from a stage that fits, or change the config"
            )
