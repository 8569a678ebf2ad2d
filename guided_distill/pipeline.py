"""Train the stages of a run in order, each from its teacher's checkpoint."""

import contextlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, replace

import jax
import numpy as np
from etils import epath

from guided_distill import draws
from guided_distill.config import AUTOENCODER, STAGES, Experiment, differences
from guided_distill.data.outline import outline_of
from guided_distill.data.source import Source
from guided_distill.errors import UserError
from guided_distill.models.registry import Params, check_network, student_params
from guided_distill.objectives.stage import Stage
from guided_distill.places import path_named
from guided_distill.run_data import has_autoencoder, latents_of, open_data, outline_of_latents
from guided_distill.runs.files import write_stages
from guided_distill.runs.folder import check_shared, check_unclaimed, claim, is_finished
from guided_distill.runs.starts import bring_from_origins, chains_to_train, check_starts
from guided_distill.runs.trained import (
    Description,
    Trained,
    load_finished,
    load_trained,
    network_of,
    package_version,
)
from guided_distill.stages import all_stages, check_batch, compiled_step, updates_of
from guided_distill.storage import held
from guided_distill.training.job import UNMONITORED, Job, Monitoring
from guided_distill.training.mesh import data_mesh, replicated, split_weights
from guided_distill.training.processes import first_alone, texts_of_all, together
from guided_distill.training.progress import console
from guided_distill.training.record import latest_step
from guided_distill.training.session import save_result, train_in


def run(experiment: Experiment, workdir: epath.Path, monitoring: Monitoring = UNMONITORED) -> None:
    """Train the stages that `experiment.stage` selects; skip finished ones and resume an interrupted one.

    Raises UserError if the workdir belongs to another config, a stage lacks its teacher, the disk is full
    or read-only, the processes of the run have different configs, or a trace was requested and no stage
    has enough updates left for it.
    """
    check_same_config(experiment)
    check_batches(experiment)
    own_latents = experiment.autoencoder.steps > 0
    with together():
        source = open_data(experiment)
        outline = outline_of_latents(source, experiment) if own_latents else source
        check_trainable(experiment, workdir, outline)
    first_alone(lambda: check_unclaimed(workdir, experiment))
    with contextlib.ExitStack() as stack:
        first_alone(lambda: stack.enter_context(held(workdir)))
        first_alone(lambda: claim(workdir, experiment))
        with together():
            check_shared(workdir)
            parts = chains_to_train(workdir, experiment)
        stages = [stage for chain, _ in parts for stage in chain]
        first_alone(lambda: write_stages(workdir, updates_of(experiment, stages)))
        first_alone(lambda: bring_from_origins(workdir, experiment))
        if own_latents:
            trained = has_autoencoder(workdir)
            source = latents_of(source, experiment, workdir, monitoring)
            monitoring = monitoring if trained else replace(monitoring, profile=None)
        Pipeline(experiment, workdir, source, monitoring).train(parts)


def check_same_config(experiment: Experiment) -> None:
    """Raises UserError in every process unless all processes have the same config."""
    first, *others = texts_of_all(json.dumps(asdict(experiment)))
    for index, other in enumerate(others, start=1):
        for key, (theirs, ours) in differences(json.loads(other), json.loads(first)).items():
            raise UserError(
                f"config.{key} is {theirs!r} in process {index} and {ours!r} in process 0: start all "
                f"processes by the same command"
            )


def check_batches(experiment: Experiment) -> None:
    """Raises UserError, naming the key, if the devices of all processes can't share a batch."""
    kinds = {stage.kind for stage in all_stages(experiment)}
    if experiment.autoencoder.steps:
        kinds.add(AUTOENCODER)
    for kind in sorted(kinds):
        if experiment.stage in ("all", kind):
            check_batch(kind, getattr(experiment, kind), devices=jax.device_count())


def check_trainable(experiment: Experiment, workdir: epath.Path, source: Source) -> None:
    """Raises UserError if the network can't be built, or the run can't start from the given model."""
    network = network_of(experiment.model, outline_of(source))
    check_network(network)
    for kind in STAGES:
        clipped = getattr(getattr(experiment, kind), "clipped", False)
        if clipped and not network.of_images:
            raise UserError(
                f"config.{kind}.clipped is for pixels, and {source.name} has none: set it to False"
            )
    data_mesh(fsdp=experiment.fsdp)
    check_starts(workdir, experiment, source, network)


class Pipeline:
    """Trains the stages of one run."""

    def __init__(
        self, experiment: Experiment, workdir: epath.Path, source: Source, monitoring: Monitoring
    ) -> None:
        self._experiment = experiment
        self._workdir = workdir
        self._source = source
        self._monitoring = monitoring
        self._mesh = data_mesh(fsdp=experiment.fsdp)
        self._latest: Trained | None = None

    def train(self, parts: Sequence[tuple[list[Stage], bool]]) -> None:
        """Train the unfinished stages that the config selects, chain by chain; see `chains_to_train`."""
        for chain, starts in parts:
            start = self._start() if starts else None
            for index, stage in enumerate(chain):
                if not self._wanted(stage):
                    continue
                if is_finished(self._workdir, stage):
                    console.print(f"{stage.name} is done", highlight=False)
                else:
                    self._latest = self._result(chain[: index + 1], start)
        if self._monitoring.profile is not None:
            raise UserError(
                f"--profile is {self._monitoring.profile}, but no stage is left to train: leave it out"
            )

    def _start(self) -> Trained:
        """The model of another run that this one starts from."""
        return load_finished(path_named(str(self._experiment.start_from)), self._mesh)

    def _wanted(self, stage: Stage) -> bool:
        return self._experiment.stage in ("all", stage.kind)

    def _result(self, chain: list[Stage], start: Trained | None) -> Trained | None:
        """Train the last stage, and those before it that aren't finished; return the result."""
        result, left = start, chain
        for place in reversed(range(len(chain))):
            if finished := self._finished(chain[place]):
                result, left = finished, chain[place + 1 :]
                break
            if not self._wanted(chain[place]):
                raise UserError(
                    f"{self._workdir / chain[place].name} is not finished, and the next stage needs it: "
                    f"train it with --config.stage={chain[place].kind}, or everything with "
                    f"--config.stage=all"
                )
        for stage in left:
            result = self._train(stage, result)
        return result

    def _finished(self, stage: Stage) -> Trained | None:
        """The result of a stage; None unless its last checkpoint exists and is intact."""
        directory = self._workdir / stage.name
        if self._latest is not None and self._latest.path == str(directory):
            return self._latest
        if latest_step(directory) != stage.total_steps:
            return None
        loaded = load_trained(directory, self._mesh, total_steps=stage.total_steps)
        return loaded if loaded is not None and loaded.finished else None

    def _train(self, stage: Stage, teacher: Trained | None) -> Trained:
        """Train a stage from its newest checkpoint, or from its teacher's weights."""
        about = self._describe(stage, teacher)
        seed = zlib.crc32(f"{self._experiment.seed}/{stage.name}".encode())
        init_key, loss_key = jax.random.split(draws.key_of(seed))
        order = all_stages(self._experiment)
        job = Job(
            self._workdir / stage.name,
            title=f"[{order.index(stage) + 1}/{len(order)}] {stage.name}",
            about=about.to_json(),
            settings=stage.settings,
            total_steps=stage.total_steps,
            seed=seed,
            key=loss_key,
            cadence=self._experiment.cadence,
            mesh=self._mesh,
            monitoring=self._monitoring,
        )
        if teacher is not None and stage.total_steps == 0:
            save_result(job.directory, teacher.params, about=job.about)
            console.print(f"{stage.name} is its teacher, {teacher.path}", highlight=False)
            return Trained(str(job.directory), 0, teacher.params, about)
        self._monitoring = replace(self._monitoring, profile=None)
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

        state = train_in(
            job,
            self._source,
            compiled_step(stage, student=network, teacher=tutor, mesh=self._mesh),
            shapes=shapes,
            initial=initial,
            frozen={
                # Outside of a program, which would copy weights that already have this precision.
                "params": tutor.rounded(teacher.params) if teacher else {},
                # Put on the devices once, so that no step transfers them.
                **jax.device_put(
                    {"num_steps": np.int32(stage.num_steps or 0), "null": self._source.null},
                    replicated(self._mesh),
                ),
            },
            # Latents were encoded in both orientations.
            flip=self._experiment.data.flip and not self._source.latent,
        )
        return Trained(str(job.directory), stage.total_steps, state.result, about)

    def _given_weights(self, teacher: Trained | None) -> Params:
        """The initial weights: the teacher's, those of config.teacher.initial, or none."""
        path = self._experiment.teacher.initial
        if teacher is not None:
            return teacher.params
        if path is None:
            return {}
        return load_finished(path_named(path), self._mesh).params

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
