"""A trained model: its description and its weights, from a stage's folder or from one file."""

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from guided_distill import kinds
from guided_distill.config import AUTOENCODER, Experiment, Model, parse_recorded
from guided_distill.diffusion.schedules import SCHEDULES
from guided_distill.errors import UserError
from guided_distill.models.outline import LABEL, Outline
from guided_distill.models.registry import Network, Params, build_network
from guided_distill.models.weights import weight_shapes
from guided_distill.objectives.stage import stage_name
from guided_distill.runs.model_file import ModelFile, is_model_file
from guided_distill.storage import first_line
from guided_distill.training.checkpoints import StageCheckpoints, abstract
from guided_distill.training.mesh import data_mesh
from guided_distill.training.record import latest_step


@dataclass(frozen=True)
class Description:
    """The `about` item of a checkpoint or a model's file.

    num_steps, sampler: those that a student was trained for; None for the teacher and stage one, which
    are trained at every t. w_min, w_max: the range of w that the network is conditioned on; None for the
    teacher and for two-student rounds, which don't take w. teacher: folder and step of the checkpoint
    that taught it. total_steps: updates of the whole stage. condition_shapes, latent: as in `Network`.
    """

    stage: str
    total_steps: kinds.Whole
    num_steps: kinds.NumSteps | None
    sampler: str | None
    w_min: kinds.Weight | None
    w_max: kinds.Weight | None
    data_shape: tuple[kinds.Width, ...]
    class_names: tuple[str, ...]
    teacher: Mapping[str, Any] | None
    package_version: str
    experiment: Experiment
    condition_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: dict(LABEL))
    latent: bool = False

    @property
    def stage_name(self) -> str:
        """The folder of the stage in a run."""
        return stage_name(self.stage, self.sampler, self.num_steps)

    @property
    def model(self) -> Model:
        """The network's name, options, parameterization and schedule."""
        return self.experiment.model

    @property
    def outline(self) -> Outline:
        """The outline of the data."""
        return Outline(self.data_shape, len(self.class_names), self.condition_shapes, self.latent)

    def network(self) -> Network:
        """The network that the weights belong to."""
        network = network_of(self.model, self.outline)
        if self.w_min is None:
            return network
        return network.conditioned_on_w(self.experiment.guidance.w_embedding)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values; the inverse of `from_json`."""
        fields = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {
            **fields,
            "experiment": dataclasses.asdict(self.experiment),
            "condition_shapes": dict(self.condition_shapes),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Description":
        """The description that `to_json` wrote.

        Raises UserError, naming the key, for a value of another type, and KeyError for a missing key.
        """
        fields = {each.name: each.type for each in dataclasses.fields(cls)}
        for name in values.keys() - fields:
            raise UserError(f"{name} is unknown")
        shapes = values.get("condition_shapes", dict(LABEL))
        given = {
            **{
                name: kinds.parse_value(name, value, fields[name]) for name, value in values.items()
            },
            "experiment": parse_recorded(
                kinds.parse_value("config", values["experiment"], dict[str, Any])
            ),
            "condition_shapes": {
                name: kinds.parse_value(f"condition_shapes.{name}", shape, tuple[int, ...])
                for name, shape in kinds.parse_value(
                    "condition_shapes", shapes, dict[str, Any]
                ).items()
            },
        }
        for name, value in given.items():
            kinds.check(name, value, fields[name])
        return cls(**given)


def network_of(model: Model, outline: Outline) -> Network:
    """The network of a config for data of this outline, without w."""
    return build_network(
        name=model.name,
        options=model.options,
        parameterization=model.parameterization,
        schedule=SCHEDULES[model.schedule](**model.schedule_options),
        dtype=model.dtype,
        outline=outline,
    )


def package_version() -> str:
    """The installed version of guided_distill."""
    return importlib.metadata.version("guided_distill")


@dataclass(frozen=True)
class Trained:
    """The resulting weights of a stage after `step` updates, and their description.

    path: the stage's folder, or the model's file.
    """

    path: str
    step: int
    params: Params
    description: Description

    @property
    def finished(self) -> bool:
        """Whether the stage is finished."""
        return self.step == self.description.total_steps

    @property
    def name(self) -> str:
        """The name of its folder or its file, for files made from it."""
        path = epath.Path(self.path)
        return path.stem if is_model_file(path) else path.name


def read_description(path: epath.Path) -> Description:
    """Describe the newest intact checkpoint of a stage's folder, or the model of a file.

    Raises UserError if there is none, or if it is of an autoencoder, which doesn't sample.
    """
    with _opened(path) as source:
        about = source.about() if source else None
    if about is None:
        raise _no_checkpoint(path)
    return _described(about, path)


def read_finished(path: epath.Path) -> Description:
    """Like `read_description`. Raises UserError also if the stage isn't finished."""
    description = read_description(path)
    if not is_model_file(path):
        _check_finished(path, latest_step(path), description)
    return description


def load_trained(
    path: epath.Path, mesh: Mesh | None = None, *, total_steps: int | None = None
) -> Trained | None:
    """Load the newest intact checkpoint of a stage's folder, None if there is none; or a model's file.

    The weights are sharded over the mesh; without one, replicated on all devices. total_steps: as in
    `StageCheckpoints`.
    """
    with _opened(path, total_steps=total_steps) as source:
        about = source.about() if source else None
        if source is None or about is None:
            return None
        description = _described(about, path)
        shapes = weight_shapes(lambda: description.network().init(jax.random.key(0)), path)
        result = source.restore_result(abstract(shapes, mesh or data_mesh()))
    if result is None:
        return None
    step, params = result
    return Trained(str(path), step, params, description)


def load_finished(path: epath.Path, mesh: Mesh | None = None) -> Trained:
    """Like `load_trained`. Raises UserError if the stage has no checkpoint or isn't finished."""
    trained = load_trained(path, mesh)
    if trained is None:
        raise _no_checkpoint(path)
    _check_finished(path, trained.step, trained.description)
    return trained


@contextlib.contextmanager
def _opened(
    path: epath.Path, *, total_steps: int | None = None
) -> Iterator[StageCheckpoints | ModelFile | None]:
    """The file or the checkpoints of a trained model; None for a folder without checkpoints."""
    if is_model_file(path):
        yield ModelFile(path)
    elif (path / "checkpoints").exists():
        with StageCheckpoints(path, total_steps=total_steps) as checkpoints:
            yield checkpoints
    else:
        yield None


def _described(about: Mapping[str, Any], path: epath.Path) -> Description:
    if about.get("stage") == AUTOENCODER:
        raise UserError(f"{path} is an {AUTOENCODER}: give the folder of a stage that samples")
    try:
        return Description.from_json(about)
    except (UserError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} has a description that can't be read ({first_line(error)}): use the version of "
            f"guided_distill that wrote it"
        ) from error


def _check_finished(path: epath.Path, step: int | None, description: Description) -> None:
    if step != description.total_steps:
        raise UserError(
            f"{path} stopped at step {step} of {description.total_steps}: run "
            f"`guided-distill train` again to finish it"
        )


def _no_checkpoint(path: epath.Path) -> UserError:
    return UserError(
        f"{path} holds no checkpoint: give the folder of a stage that "
        f"`guided-distill train` has finished"
    )
