"""Which stages a run has, in which order, from which checkpoint; and how each is trained."""

import contextlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath

from guided_distill import draws
from guided_distill.config import (
    AUTOENCODER,
    STAGES,
    Experiment,
    changed_keys,
    differences,
)
from guided_distill.data.source import Source
from guided_distill.errors import UserError
from guided_distill.layouts.companions import bring_companions
from guided_distill.models.registry import Params, check_network, student_params
from guided_distill.objectives.stage import Stage
from guided_distill.places import path_named
from guided_distill.run_data import latents_of, open_data, outline_of_latents
from guided_distill.runs import is_finished, read_config
from guided_distill.stages import all_stages, chains, check_batch, compiled_step
from guided_distill.storage import (
    check_writable,
    held,
    is_there,
    persistently,
    write_text,
)
from guided_distill.training.checkpoints import latest_step
from guided_distill.training.mesh import data_mesh, replicated, split_weights
from guided_distill.training.processes import first_alone, texts_of_all, together
from guided_distill.training.progress import console
from guided_distill.training.session import hand_on, train_in
from guided_distill.training.trained import (
    Description,
    Trained,
    load_finished,
    load_trained,
    network_of,
    package_version,
    read_finished,
)


def run(experiment: Experiment, workdir: epath.Path) -> None:
    """Train what `experiment.stage` asks for, skipping what is done and resuming what was cut.

    Raises UserError if the workdir belongs to another config, if a stage lacks its teacher, if the disk
    is full or not to be written, or if the processes that train together differ in their configs.
    """
    check_same_config(experiment)
    check_batches(experiment)
    with together():
        source = open_data(experiment)
        own_latents = experiment.autoencoder.steps > 0
        outline = outline_of_latents(source, experiment) if own_latents else source
        Pipeline(experiment, workdir, outline)  # Checks the config before the folder is claimed.
    first_alone(lambda: check_unclaimed(workdir, experiment))
    with contextlib.ExitStack() as stack:
        first_alone(lambda: stack.enter_context(held(workdir)))
        first_alone(lambda: claim(workdir, experiment))
        with together():
            check_shared(workdir)
        first_alone(lambda: bring_from_origins(workdir, experiment))
        if own_latents:
            source = latents_of(source, experiment, workdir)
        pipeline = Pipeline(experiment, workdir, source)
        for chain in chains(experiment):
            pipeline.train_chain(chain)


def check_same_config(experiment: Experiment) -> None:
    """Raises UserError, in every process, unless all that train together have the same config."""
    first, *others = texts_of_all(json.dumps(asdict(experiment)))
    for index, other in enumerate(others, start=1):
        for key, (theirs, ours) in differences(json.loads(other), json.loads(first)).items():
            raise UserError(
                f"config.{key} is {theirs!r} in process {index} and {ours!r} in process 0: start all "
                f"processes by the same command"
            )


def check_batches(experiment: Experiment) -> None:
    """Raises UserError, naming the key, for a batch that the devices of all processes can't share."""
    kinds = {stage.kind for stage in all_stages(experiment)}
    if experiment.autoencoder.steps:
        kinds.add(AUTOENCODER)
    for kind in sorted(kinds):
        if experiment.stage in ("all", kind):
            check_batch(kind, getattr(experiment, kind), devices=jax.device_count())


def check_shared(workdir: epath.Path) -> None:
    """Raises UserError unless this process sees the run's folder and can write to it."""
    if not is_there(workdir / "config.json"):
        raise UserError(
            f"process {jax.process_index()} doesn't see {workdir}, which process 0 has written: give a "
            f"--workdir that all of them share"
        )
    persistently(partial(check_writable, workdir), workdir)


def claim(workdir: epath.Path, experiment: Experiment) -> None:
    """Write the config to the workdir. Raises UserError if one that differs is there already."""
    check_unclaimed(workdir, experiment)
    write_text(workdir / "config.json", json.dumps(asdict(experiment), indent=2))


def check_unclaimed(workdir: epath.Path, experiment: Experiment) -> None:
    """Raises UserError if the workdir holds a config that differs in more than where it started from.

    That may be spelled in another way, or have moved, and is of no account to a run that has a result.
    """
    if is_there(workdir / "config.json"):
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
                f"{workdir} was made by another config ({listed}): choose another --workdir, or give "
                f"the same values to go on"
            )


def _differ(old: epath.Path, new: epath.Path) -> bool:
    """Whether two paths name two stages; one that is gone may have become the other."""
    return is_there(old) and old.resolve() != new.resolve()


def bring_from_origins(workdir: epath.Path, experiment: Experiment) -> None:
    """Copy the companions of the runs that the experiment starts from, if it has yet to start."""
    for origin in (experiment.start_from, experiment.teacher.initial):
        if origin and unbegun(workdir, experiment):
            bring_companions(path_named(origin).parent, workdir)


def unbegun(workdir: epath.Path, experiment: Experiment) -> list[list[Stage]]:
    """The chains without a finished stage: they alone need the run that another one starts from."""
    return [
        chain
        for chain in chains(experiment)
        if not any(is_finished(workdir, stage) for stage in chain)
    ]


class Pipeline:
    """Trains the stages of one run."""

    def __init__(self, experiment: Experiment, workdir: epath.Path, source: Source) -> None:
        self._experiment = experiment
        self._workdir = workdir
        self._source = source
        self._mesh = data_mesh(fsdp=experiment.fsdp)
        self._network = network_of(
            experiment.model,
            self._source.shape,
            num_classes=self._source.num_classes,
            condition_shapes=self._source.condition_shapes,
            latent=self._source.latent,
        )
        check_network(self._network)
        for kind in ("guidance", "halving"):
            if getattr(experiment, kind).clipped and not self._network.of_images:
                raise UserError(
                    f"config.{kind}.clipped is for pixels, and {source.name} has none: set it to False"
                )
        self._unbegun = unbegun(workdir, experiment)
        if experiment.teacher.initial and self._unbegun:
            self._check_initial(experiment.teacher.initial)
        if experiment.start_from and self._unbegun:
            start = read_finished(path_named(experiment.start_from))
            for chain in self._unbegun:
                self._check_start(experiment.start_from, start, chain)
        self._start: Trained | None = None
        self._latest: Trained | None = None

    def train_chain(self, chain: list[Stage]) -> None:
        """Train the unfinished stages of a chain that the config asks for."""
        start_from = self._experiment.start_from
        if start_from and chain in self._unbegun:
            self._start = load_finished(path_named(start_from), self._mesh)
            chain = _left_after(self._start.description.stage, chain)
        elif start_from:
            # What comes before the first result of its own was another run's.
            finished = [is_finished(self._workdir, stage) for stage in chain]
            chain = chain[finished.index(True) :]
        for index, stage in enumerate(chain):
            if self._wanted(stage):
                if is_finished(self._workdir, stage):
                    console.print(f"{stage.name} is done", highlight=False)
                else:
                    self._weights(chain, index)

    def _wanted(self, stage: Stage) -> bool:
        return self._experiment.stage in ("all", stage.kind)

    def _weights(self, chain: list[Stage], index: int) -> Trained | None:
        """What chain[index] hands on, trained first where it isn't finished, its teachers before it."""
        if index < 0:
            return self._start
        stage = chain[index]
        directory = self._workdir / stage.name
        if self._latest is None or self._latest.path != str(directory):
            loaded = None
            if latest_step(directory) == stage.total_steps:
                loaded = load_trained(directory, self._mesh, total_steps=stage.total_steps)
            if loaded is None or not loaded.finished:
                if not self._wanted(stage):
                    raise UserError(
                        f"{directory} is not finished, and the next stage needs it: train it with "
                        f"--config.stage={stage.kind}, or everything with --config.stage=all"
                    )
                loaded = self._train(stage, self._weights(chain, index - 1))
            self._latest = loaded
        return self._latest

    def _train(self, stage: Stage, teacher: Trained | None) -> Trained:
        """Train a stage from its newest checkpoint, or from its teacher's weights."""
        experiment = self._experiment
        directory = self._workdir / stage.name
        seed = zlib.crc32(f"{experiment.seed}/{stage.name}".encode())
        init_key, loop_key = jax.random.split(draws.key_of(seed))
        order = all_stages(experiment)
        about = self._describe(stage, teacher)
        if teacher is not None and stage.total_steps == 0:
            hand_on(directory, teacher.params, about=about.to_json())
            console.print(f"{stage.name} is its teacher, {teacher.path}", highlight=False)
            return Trained(str(directory), 0, teacher.params, about)
        network = about.network()
        tutor = teacher.description.network() if teacher else network
        shapes = jax.eval_shape(network.init, init_key)

        def initial() -> Params:
            given = self._given_weights(teacher)
            if teacher is not None and tutor == network:
                return given
            places = split_weights(self._mesh, shapes)
            params = jax.jit(network.init, out_shardings=places)(init_key)
            return student_params(params, given) if given else params

        step, optimizer = compiled_step(stage, student=network, teacher=tutor, mesh=self._mesh)
        state = train_in(
            directory,
            source=self._source,
            # Latents are encoded in both orientations.
            flip=experiment.data.flip and not self._source.latent,
            seed=seed,
            shapes=shapes,
            initial=initial,
            step=step,
            optimizer=optimizer,
            settings=stage.settings,
            total_steps=stage.total_steps,
            frozen={
                # Not in a program, which would copy what is in that precision already.
                "params": tutor.rounded(teacher.params) if teacher else {},
                # On the devices already, or they would be sent there at every step.
                **jax.device_put(
                    {"num_steps": np.int32(stage.num_steps or 0), "null": self._source.null},
                    replicated(self._mesh),
                ),
            },
            key=loop_key,
            cadence=experiment.cadence,
            about=about.to_json(),
            mesh=self._mesh,
            title=f"[{order.index(stage) + 1}/{len(order)}] {stage.name}",
        )
        return Trained(str(directory), stage.total_steps, state.result, about)

    def _given_weights(self, teacher: Trained | None) -> Params:
        """What a stage starts from: its teacher's weights, those of config.teacher.initial, or none."""
        path = self._experiment.teacher.initial
        if teacher is not None:
            return teacher.params
        if path is None:
            return {}
        return load_finished(path_named(path), self._mesh).params

    def _check_initial(self, path: str) -> None:
        """Raises UserError unless config.teacher.initial names a teacher with this run's network."""
        about = read_finished(path_named(path))
        if about.stage != "teacher":
            raise UserError(
                f"config.teacher.initial={path} is a {about.stage} stage: give a teacher"
            )
        self._check_same("teacher.initial", path, self._differences(about))

    def _differences(self, about: Description) -> dict[str, tuple[Any, Any]]:
        """What makes a network other than this run's teacher, by name: (there, needed here)."""
        network, source = about.network(), self._source
        theirs = {
            **network.options,
            "data_shape": about.data_shape,
            "condition": dict(about.condition_shapes),
            "number of classes": len(about.class_names),
        }
        ours = {
            **self._network.options,
            "data_shape": source.shape,
            "condition": dict(source.condition_shapes),
            "number of classes": source.num_classes,
        }
        return {name: (theirs.get(name), needed) for name, needed in ours.items()}

    def _check_same(self, key: str, path: str, pairs: Mapping[str, tuple[Any, Any]]) -> None:
        for name, (theirs, needed) in pairs.items():
            if theirs != needed:
                raise UserError(
                    f"config.{key}={path} has another {name} ({theirs}) than this run needs ({needed}): "
                    f"start from a stage that fits, or change the config"
                )

    def _describe(self, stage: Stage, teacher: Trained | None) -> Description:
        w_min, w_max = stage.w_range or (None, None)
        return Description(
            stage=stage.kind,
            total_steps=stage.total_steps,
            num_steps=stage.num_steps,
            sampler=stage.sampler,
            w_min=w_min,
            w_max=w_max,
            data_shape=self._source.shape,
            class_names=self._source.class_names,
            teacher={"path": teacher.path, "step": teacher.step} if teacher else None,
            package_version=package_version(),
            experiment=self._experiment,
            condition_shapes=self._source.condition_shapes,
            latent=self._source.latent,
        )

    def _check_start(self, path: str, about: Description, chain: list[Stage]) -> None:
        """Raises UserError unless the chain can go on from `path`, a stage of another run."""
        ours = self._experiment
        same: dict[str, tuple[Any, Any]] = {}
        if about.stage != "teacher":
            same["method"] = (about.experiment.method, ours.method)
        same |= {
            key: (getattr(about.model, key), getattr(ours.model, key))
            for key in ("parameterization", "schedule", "schedule_options")
        } | self._differences(about)
        if about.w_min is not None:
            here = (ours.guidance.w_min, ours.guidance.w_max)
            same["w range"] = ((about.w_min, about.w_max), here)
            theirs = about.experiment.guidance.w_embedding
            same["w_embedding"] = (theirs, ours.guidance.w_embedding)
        if about.stage == "halving":
            first = chain[-1].sampler, 2 * ours.halving.first_num_steps
            same["sampler and num_steps"] = ((about.sampler, about.num_steps), first)
        self._check_same("start_from", path, same)


def _left_after(kind: str, chain: list[Stage]) -> list[Stage]:
    """What a chain still has to do after a stage of another run; its halving rounds after any round."""
    after = STAGES.index(kind) + (kind != "halving")
    return [stage for stage in chain if STAGES.index(stage.kind) >= after]
