"""A run's configuration: its keys, their types and defaults, and the checks of their values.

Config files start from `default_config()` and change the keys that they need. `parse` turns the
ConfigDict into the frozen dataclasses below, which the rest of the package reads.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import ml_collections

from guided_distill import kinds
from guided_distill.diffusion.process import PARAMETERIZATIONS
from guided_distill.diffusion.samplers import SAMPLERS
from guided_distill.diffusion.schedules import (
    CHAINS,
    NUM_TIMESTEPS,
    SCHEDULES,
    check_schedule,
)
from guided_distill.errors import UserError
from guided_distill.objectives.autoencoder import Autoencoder
from guided_distill.objectives.consistency import Consistency, ConsistencyStage
from guided_distill.objectives.continuous import Continuous, ContinuousStage
from guided_distill.objectives.guidance import Guidance, GuidanceStage
from guided_distill.objectives.halving import Halving, HalvingStage
from guided_distill.objectives.stage import SecondStage, Stage, check_optimization
from guided_distill.objectives.teacher import Teacher, TeacherStage
from guided_distill.training.job import Cadence

AUTOENCODER = "autoencoder"
METHODS = ("guided", "naive", "two_student")
DTYPES = ("float32", "bfloat16")
EXTRACTORS = ("classifier", "lite0", "lite0:PATH", "inception:PATH", "clip:PATH")


@dataclass(frozen=True)
class Data:
    """The training data."""

    name: str = "digits"
    """The source: a name of guided_distill.data.sources."""
    image_size: kinds.Width | None = None
    """Side in pixels that images are scaled and cropped to; None keeps theirs."""
    channels: kinds.Width | None = None
    """The number that the data must have, 1 for gray and 3 for colour; None accepts any."""
    flip: bool = False
    """Whether training mirrors images at random."""
    text_encoder: str | None = None
    """A name of guided_distill.text.registry, which conditions on the data's captions; None conditions on
    their labels."""
    shape: tuple[kinds.Width, ...] = ()
    """The shape of an example, such as (64, 64, 4). `plan` uses it if the data are missing; otherwise
    the data must match it. An empty shape accepts any."""
    condition: dict[str, Any] = field(default_factory=dict)
    """The shapes of an example's condition, such as {"text": (77, 768)}, or {"label": 10} for the number
    of classes; used as `shape` is."""

    @property
    def title(self) -> str:
        """The name to show, without folders of this machine: "x.npz" for "npz:/home/me/x.npz"."""
        kind, _, path = self.name.partition(":")
        on_disk = kind in ("npz", "folder", "encoded", "parquet", "arrayrecord", "webdataset")
        return path.rstrip("/").rpartition("/")[2] if on_disk else self.name


@dataclass(frozen=True)
class Model:
    """The network and its noise schedule."""

    name: str = "mlp"
    """The network: a name of guided_distill.models.registry."""
    parameterization: Annotated[str, kinds.OneOf(PARAMETERIZATIONS)] = "v"
    """What the network predicts."""
    schedule: Annotated[str, kinds.OneOf(SCHEDULES)] = "cosine"
    """The noise schedule: a function of guided_distill.diffusion.schedules."""
    schedule_options: dict[str, float] = field(default_factory=dict)
    """Arguments of the schedule's function."""
    dtype: Annotated[str, kinds.OneOf(DTYPES)] = "float32"
    """The precision in which the network computes; weights are kept in float32."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of the network's class."""


@dataclass(frozen=True)
class Evaluation:
    """Settings of `evaluate`, which samples students in their own N, and the teacher as set here."""

    extractor: str = "classifier"
    """The feature extractor, as in `evaluate --extractor`."""
    num_samples: kinds.Count = 1024
    """Samples per row of results.csv."""
    batch_size: kinds.BatchSize = 256
    """Samples drawn at once."""
    weights: tuple[kinds.Weight, ...] = (0.0, 1.0, 2.0, 4.0)
    """The guidance weights w to measure."""
    teacher_samplers: tuple[Annotated[str, kinds.OneOf(SAMPLERS)], ...] = ("ddim",)
    """The samplers to measure the teacher with."""
    teacher_num_steps: tuple[kinds.NumSteps, ...] = (1, 2, 4, 8, 16, 64)
    """The numbers of steps to measure the teacher with."""
    against_teacher: kinds.NumSteps | None = None
    """The teacher's DDIM steps for the columns fd_teacher, kid_teacher and rmse_teacher, which need as
    many samples of the teacher; None leaves them empty."""
    seed: kinds.Seed = 0
    """The seed of the samples."""


@dataclass(frozen=True)
class Stages:
    """The sections of the stages, in the order of training. A line registers a kind of stage."""

    teacher: Teacher = field(default_factory=Teacher, metadata={"stage": TeacherStage})
    guidance: Guidance = field(default_factory=Guidance, metadata={"stage": GuidanceStage})
    consistency: Consistency = field(
        default_factory=Consistency, metadata={"stage": ConsistencyStage}
    )
    continuous: Continuous = field(default_factory=Continuous, metadata={"stage": ContinuousStage})
    halving: Halving = field(default_factory=Halving, metadata={"stage": HalvingStage})


KINDS: dict[str, type[Stage]] = {
    section.name: section.metadata["stage"] for section in dataclasses.fields(Stages)
}
STAGES = tuple(KINDS)
SECOND_STAGES = tuple(name for name, kind in KINDS.items() if issubclass(kind, SecondStage))


@dataclass(frozen=True)
class Experiment(Stages):
    """A whole run."""

    seed: kinds.Seed = 0
    """The seed of the weights, batches and noise."""
    method: Annotated[str, kinds.OneOf(METHODS)] = "guided"
    """The paper's is "guided": stage one, then stage two. Its baselines have no stage one: "naive" halves
    the steps of the guided teacher directly; "two_student" halves the steps of its conditional and
    unconditional predictions separately, and applies guidance when the student is sampled."""
    second_stage: Annotated[str, kinds.OneOf(SECOND_STAGES)] = "halving"
    """The method that trains few-step students."""
    stage: Annotated[str, kinds.OneOf(("all", AUTOENCODER, *STAGES))] = "all"
    """The stages to train: all, or those of one kind."""
    start_from: str | None = None
    """The folder of a finished stage of another run, or a model's .safetensors file, to distill."""
    fsdp: kinds.Whole = 1
    """The number of devices that weights and optimizer state are sharded over, 0 for all; with several
    slices, the devices of one (guided_distill/training/mesh.py)."""
    steps_per_dispatch: kinds.Count = 50
    """Updates in one call of the compiled program."""
    log_every: kinds.Count = 100
    """Updates between two rows of the log, a multiple of steps_per_dispatch."""
    checkpoint_every: kinds.Count = 1000
    """Updates between two checkpoints, a multiple of log_every."""
    checkpoints_to_keep: kinds.Count = 2
    """The number of checkpoints that a stage keeps."""
    max_nonfinite_steps: kinds.Count = 10
    """Updates in a row whose loss isn't finite that end the training; fewer are skipped and counted."""
    data: Data = field(default_factory=Data)
    autoencoder: Autoencoder = field(default_factory=Autoencoder)
    model: Model = field(default_factory=Model)
    evaluation: Evaluation = field(default_factory=Evaluation)

    @property
    def default_num_steps(self) -> int:
        """Sampling steps of a network that isn't trained for a number: those of the first teacher."""
        return 2 * self.halving.first_num_steps

    @property
    def cadence(self) -> Cadence:
        """The keys of `Cadence`, which are this section's own."""
        return Cadence(**{key.name: getattr(self, key.name) for key in dataclasses.fields(Cadence)})


RESUMABLE_CHANGES = (
    "stage",
    "fsdp",
    "steps_per_dispatch",
    "log_every",
    "checkpoint_every",
    "checkpoints_to_keep",
    "max_nonfinite_steps",
    "evaluation",
)
"""Keys that may change between two calls on one workdir: the trained weights don't depend on them."""


def default_config() -> ml_collections.ConfigDict:
    """The ConfigDict of all defaults. It is locked: an unknown key or a value of a wrong type raises."""
    return to_config_dict(Experiment())


def to_config_dict(experiment: Experiment) -> ml_collections.ConfigDict:
    """The ConfigDict of a parsed experiment; the inverse of `parse`."""
    return _config_dict_of(experiment).lock()


def _config_dict_of(section: Any) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        if dataclasses.is_dataclass(value):
            config[entry.name] = _config_dict_of(value)
        elif value is None:
            config[entry.name] = ml_collections.config_dict.placeholder(kinds.type_of(entry.type))
        else:
            config[entry.name] = value
    return config


def parse(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Experiment:
    """Check a config and freeze it. Raises UserError, naming the key, for an invalid value."""
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    experiment = parse_recorded(values)
    kinds.check_section("config", experiment)
    for check in _RULES:
        check(experiment)
    return experiment


def parse_recorded(values: Mapping[str, Any]) -> Experiment:
    """Parse the config of an existing run without the checks of its values, which may have changed since.

    Raises UserError, naming the key, for an unknown key or a value of another type.
    """
    return kinds.parse_section("config", values, Experiment)


def changed_keys(old: Experiment, new: Experiment) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose change changes the trained weights, each with its (old, new) value.

    Adding samplers adds chains, and leaves the weights of the others unchanged. A second stage that
    neither config uses changes nothing; runs of earlier versions lack its section.
    """
    unused = [
        name for name in SECOND_STAGES if not (KINDS[name].is_used(old) or KINDS[name].is_used(new))
    ]
    changes = differences(dataclasses.asdict(old), dataclasses.asdict(new))
    if set(old.halving.samplers) <= set(new.halving.samplers):
        changes.pop("halving.samplers", None)
    return {
        key: values
        for key, values in changes.items()
        if key.split(".")[0] not in (*RESUMABLE_CHANGES, *unused)
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two configs, as dictionaries, differ, each with its (old, new) value."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    return {
        key: (flat_old.get(key), flat_new.get(key))
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key)
    }


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _check_condition(experiment: Experiment) -> None:
    for name, value in experiment.data.condition.items():
        where = f"config.data.condition.{name}"
        kind = kinds.Count if name == "label" else tuple[kinds.Width, ...]
        kinds.check(where, kinds.parse_value(where, value, kind), kind)


def _check_stages(experiment: Experiment) -> None:
    autoencoder = experiment.autoencoder
    if autoencoder.steps:
        check_optimization(AUTOENCODER, autoencoder)
    elif experiment.stage == AUTOENCODER:
        raise UserError(
            "config.stage is autoencoder, but config.autoencoder.steps is 0: set it, or choose another "
            "stage"
        )
    for kind in KINDS.values():
        kind.check(experiment)


def _check_cadence(experiment: Experiment) -> None:
    for key, unit in (("log_every", "steps_per_dispatch"), ("checkpoint_every", "log_every")):
        value, multiple_of = getattr(experiment, key), getattr(experiment, unit)
        if value % multiple_of:
            raise UserError(
                f"config.{key} is {value}; make it a multiple of config.{unit}, {multiple_of}"
            )


def _check_evaluation(experiment: Experiment) -> None:
    schedule, evaluation = experiment.model.schedule, experiment.evaluation
    if "stochastic" in evaluation.teacher_samplers:
        raise UserError(
            "config.evaluation.teacher_samplers holds stochastic, which only a student trained for it "
            "can use: take it out"
        )
    for num_steps in evaluation.teacher_num_steps:
        if schedule in CHAINS and num_steps > NUM_TIMESTEPS:
            raise UserError(
                f"config.evaluation.teacher_num_steps holds {num_steps}, but config.model.schedule is "
                f"{schedule}, a chain of {NUM_TIMESTEPS}: make it {NUM_TIMESTEPS} or less"
            )
    check_extractor("config.evaluation.extractor", experiment.evaluation.extractor)


_RULES: tuple[Callable[[Experiment], None], ...] = (
    lambda experiment: check_schedule(experiment.model.schedule, experiment.model.schedule_options),
    _check_condition,
    _check_stages,
    _check_cadence,
    _check_evaluation,
)


def check_extractor(where: str, name: str) -> None:
    """Raises UserError, naming the key or flag `where`, unless `name` is one of `EXTRACTORS`."""
    kind, _, path = name.partition(":")
    if not (name in EXTRACTORS or (path and f"{kind}:PATH" in EXTRACTORS)) or path == "PATH":
        raise UserError(f"{where} is {name!r}; choose one of {', '.join(EXTRACTORS)}")
