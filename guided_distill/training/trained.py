"""What a checkpoint says of itself, and reading one with nothing else at hand."""

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from guided_distill.config import AUTOENCODER, Experiment, Model, parse_recorded
from guided_distill.errors import UserError
from guided_distill.models.registry import LABEL, Network, Params, build_network
from guided_distill.training.checkpoints import StageCheckpoints, abstract, latest_step
from guided_distill.training.mesh import data_mesh


@dataclass(frozen=True)
class Description:
    """The `about` item of a checkpoint.

    num_steps and sampler: those of the sampler that a halving student was trained for; None for the
    teacher and the guidance stage, which know every t. w_min, w_max: the trained range of the guidance
    weight; None for the teacher and for two-student rounds, which don't take it. teacher: folder and
    step of the checkpoint that it was distilled from. total_steps: updates of the whole stage.
    condition_shapes, latent: as of `Network`.
    """

    stage: str
    total_steps: int
    num_steps: int | None
    sampler: str | None
    w_min: float | None
    w_max: float | None
    data_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    teacher: Mapping[str, Any] | None
    package_version: str
    experiment: Experiment
    condition_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: dict(LABEL))
    latent: bool = False

    @property
    def model(self) -> Model:
        """The network's name, options, parameterization and schedule."""
        return self.experiment.model

    def network(self) -> Network:
        """The network whose weights the checkpoint holds."""
        network = network_of(
            self.model,
            self.data_shape,
            num_classes=len(self.class_names),
            condition_shapes=self.condition_shapes,
            latent=self.latent,
        )
        if self.w_min is None:
            return network
        return network.told_w(self.experiment.guidance.w_embedding)

    def to_json(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; `from_json` is its inverse."""
        fields = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {
            **fields,
            "experiment": dataclasses.asdict(self.experiment),
            "condition_shapes": dict(self.condition_shapes),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Description":
        """The description that `to_json` wrote."""
        lists = {name: tuple(values[name]) for name in ("data_shape", "class_names")}
        shapes = values.get("condition_shapes", dict(LABEL))
        return cls(
            **{
                **values,
                **lists,
                "experiment": parse_recorded(values["experiment"]),
                "condition_shapes": {name: tuple(shape) for name, shape in shapes.items()},
            }
        )


def network_of(
    model: Model,
    data_shape: tuple[int, ...],
    *,
    num_classes: int,
    condition_shapes: Mapping[str, tuple[int, ...]] = MappingProxyType(dict(LABEL)),
    latent: bool = False,
) -> Network:
    """The network of a config for data of this kind; it doesn't take w."""
    return build_network(
        name=model.name,
        options=model.options,
        parameterization=model.parameterization,
        schedule=model.schedule,
        schedule_options=model.schedule_options,
        dtype=model.dtype,
        data_shape=data_shape,
        num_classes=num_classes,
        condition_shapes=tuple(sorted(condition_shapes.items())),
        latent=latent,
    )


def package_version() -> str:
    """The version of guided_distill that is installed."""
    return importlib.metadata.version("guided_distill")


@dataclass(frozen=True)
class Trained:
    """The weights that a stage handed on after `step` updates, and what they are."""

    path: str
    step: int
    params: Params
    description: Description

    @property
    def finished(self) -> bool:
        """Whether the stage ran to its end."""
        return self.step == self.description.total_steps


def read_description(directory: epath.Path) -> Description:
    """What the newest whole checkpoint of a stage's folder is.

    Raises UserError if there is none, or one of an autoencoder, which doesn't sample.
    """
    about = None
    if (directory / "checkpoints").exists():
        with StageCheckpoints(directory) as checkpoints:
            about = checkpoints.about()
    if about is None:
        raise _no_checkpoint(directory)
    if about["stage"] == AUTOENCODER:
        raise UserError(f"{directory} is an {AUTOENCODER}: give the folder of a stage that samples")
    return Description.from_json(about)


def read_finished(directory: epath.Path) -> Description:
    """As `read_description`. Raises UserError if the stage has no checkpoint or was cut short."""
    description = read_description(directory)
    _check_finished(directory, latest_step(directory), description)
    return description


def load_trained(
    directory: epath.Path, mesh: Mesh | None = None, *, total_steps: int | None = None
) -> Trained | None:
    """The newest whole checkpoint of a stage's folder; None if there is none.

    Its weights live as the mesh says; without one, whole on all devices. total_steps: as of
    `StageCheckpoints`.
    """
    if not (directory / "checkpoints").exists():
        return None
    with StageCheckpoints(directory, total_steps=total_steps) as checkpoints:
        about = checkpoints.about()
        if about is None:
            return None
        description = Description.from_json(about)
        shapes = jax.eval_shape(description.network().init, jax.random.key(0))
        template = abstract(shapes, mesh or data_mesh())
        result = checkpoints.restore_result(template)
    if result is None:
        return None
    return Trained(str(directory), *result, description)


def load_finished(directory: epath.Path, mesh: Mesh | None = None) -> Trained:
    """As `load_trained`. Raises UserError if the stage has no checkpoint or was cut short."""
    trained = load_trained(directory, mesh)
    if trained is None:
        raise _no_checkpoint(directory)
    _check_finished(directory, trained.step, trained.description)
    return trained


def _check_finished(directory: epath.Path, step: int | None, description: Description) -> None:
    if step != description.total_steps:
        raise UserError(
            f"{directory} stopped at step {step} of {description.total_steps}: run "
            f"`guided-distill train` again to finish it"
        )


def _no_checkpoint(directory: epath.Path) -> UserError:
    return UserError(
        f"{directory} holds no checkpoint: give the folder of a stage that "
        f"`guided-distill train` has finished"
    )
