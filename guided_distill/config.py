"""A run's configuration: typed, with its defaults, and checked; every error names the key.

Config files start from `default_config()` and change what they need; `parse` turns the ConfigDict
into the frozen dataclasses below, which is what the rest of the package reads.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import ml_collections

from guided_distill import kinds
from guided_distill.diffusion.process import PARAMETERIZATIONS
from guided_distill.diffusion.samplers import ENCODE, SAMPLERS
from guided_distill.diffusion.schedules import (
    CHAINS,
    NUM_TIMESTEPS,
    SCHEDULES,
    check_schedule,
    last_log_snr,
)
from guided_distill.errors import UserError
from guided_distill.objectives.autoencoder import Autoencoder
from guided_distill.objectives.guidance import Guidance
from guided_distill.objectives.halving import JUMPS, Halving
from guided_distill.objectives.teacher import Teacher
from guided_distill.training.job import Cadence

STAGES = ("teacher", "guidance", "halving")
AUTOENCODER = "autoencoder"
METHODS = ("guided", "naive", "two_student")
DTYPES = ("float32", "bfloat16")
EXTRACTORS = ("classifier", "lite0", "lite0:PATH", "inception:PATH", "clip:PATH")


@dataclass(frozen=True)
class Data:
    """Where examples come from: a name of guided_distill.data.sources.

    channels: what the data must have, 1 for gray and 3 for colour; None takes it as it comes.
    text_encoder: a name of guided_distill.text.registry to condition on the data's captions; None
    conditions on their labels. shape, condition: what an example and its condition are like, such as
    (64, 64, 4) and {"text": (77, 768)}, or {"label": 10} for the number of classes: what a plan asks when
    the data aren't there, and checked when they are; an empty shape takes them as they come.
    """

    name: str = "digits"
    image_size: kinds.Width | None = None
    channels: kinds.Width | None = None
    flip: bool = False
    text_encoder: str | None = None
    shape: tuple[kinds.Width, ...] = ()
    condition: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The name for pages, without the place on this machine: "x.npz" for "npz:/home/me/x.npz"."""
        kind, _, path = self.name.partition(":")
        on_disk = kind in ("npz", "folder", "encoded")
        return path.rstrip("/").rpartition("/")[2] if on_disk else self.name


@dataclass(frozen=True)
class Model:
    """The network: a name of guided_distill.models.registry, and that class's own fields as options.

    schedule_options: what the schedule's function in guided_distill.diffusion.schedules takes.
    """

    name: str = "mlp"
    parameterization: Annotated[str, kinds.OneOf(PARAMETERIZATIONS)] = "v"
    schedule: Annotated[str, kinds.OneOf(SCHEDULES)] = "cosine"
    schedule_options: dict[str, float] = field(default_factory=dict)
    dtype: Annotated[str, kinds.OneOf(DTYPES)] = "float32"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measures: every student at its own N, and the teacher by these samplers.

    extractor: what it looks through, one of `EXTRACTORS`.
    """

    extractor: str = "classifier"
    num_samples: kinds.Count = 1024
    batch_size: kinds.BatchSize = 256
    weights: tuple[kinds.Weight, ...] = (0.0, 1.0, 2.0, 4.0)
    teacher_samplers: tuple[Annotated[str, kinds.OneOf(SAMPLERS)], ...] = ("ddim",)
    teacher_num_steps: tuple[kinds.NumSteps, ...] = (1, 2, 4, 8, 16, 64)
    seed: kinds.Seed = 0


@dataclass(frozen=True)
class Experiment:
    """A whole run.

    method: "guided" is the paper's: stage one, then halving. Its baselines go without stage one: "naive"
    halves the steps of the guided teacher directly; "two_student" halves those of its conditional and
    unconditional branches apart, and guides the student when it is sampled.
    stage: "all", or the one stage that `train` should run. start_from: the folder of a finished stage
    of another run, or a model's .safetensors file, to distill a teacher that was trained elsewhere.
    fsdp: over how many devices weights and optimizer are split, 0 for all; of several slices, those of
    one (guided_distill/training/mesh.py).
    """

    seed: kinds.Seed = 0
    method: Annotated[str, kinds.OneOf(METHODS)] = "guided"
    stage: Annotated[str, kinds.OneOf(("all", AUTOENCODER, *STAGES))] = "all"
    start_from: str | None = None
    fsdp: kinds.Whole = 1
    steps_per_dispatch: kinds.Count = 50
    log_every: kinds.Count = 100
    checkpoint_every: kinds.Count = 1000
    checkpoints_to_keep: kinds.Count = 2
    max_nonfinite_steps: kinds.Count = 10
    data: Data = field(default_factory=Data)
    autoencoder: Autoencoder = field(default_factory=Autoencoder)
    model: Model = field(default_factory=Model)
    teacher: Teacher = field(default_factory=Teacher)
    guidance: Guidance = field(default_factory=Guidance)
    halving: Halving = field(default_factory=Halving)
    evaluation: Evaluation = field(default_factory=Evaluation)

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
"""Keys that may differ between two calls on one workdir: they leave the trained weights the same."""


def default_config() -> ml_collections.ConfigDict:
    """Every key at its default, locked: an unknown key raises, a wrong type too."""
    return to_config_dict(Experiment())


def to_config_dict(experiment: Experiment) -> ml_collections.ConfigDict:
    """The ConfigDict of a parsed experiment; `parse` is its inverse."""
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
    """Check a config and freeze it. Raises UserError, naming the key, for anything amiss."""
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    experiment = parse_recorded(values)
    kinds.check_section("config", experiment)
    for check in _RULES:
        check(experiment)
    return experiment


def parse_recorded(values: Mapping[str, Any]) -> Experiment:
    """The config of a run that is there, whose values met the rules of its time.

    Raises UserError, naming the key, for one that is unknown, or of another type.
    """
    return kinds.parse_section("config", values, Experiment)


def changed_keys(old: Experiment, new: Experiment) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ and make other weights, each with its (old, new) value.

    Chains of more samplers make none: those there were stay as they are.
    """
    changes = differences(dataclasses.asdict(old), dataclasses.asdict(new))
    if set(old.halving.samplers) <= set(new.halving.samplers):
        changes.pop("halving.samplers", None)
    return {
        key: values for key, values in changes.items() if key.split(".")[0] not in RESUMABLE_CHANGES
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys of two configs as dictionaries whose values differ, each with its (old, new) value."""
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


def _check_guidance(experiment: Experiment) -> None:
    teacher, guidance = experiment.teacher, experiment.guidance
    low, high = guidance.w_min, guidance.w_max
    if low > high:
        raise UserError(
            f"config.guidance.w_min is {low}, above config.guidance.w_max, which is {high}: swap them"
        )
    for w in experiment.evaluation.weights:
        if not low <= w <= high:
            raise UserError(
                f"config.evaluation.weights holds {w}, outside the trained range [{low}, {high}] of "
                f"config.guidance.w_min and w_max: take it out or widen the range"
            )
    guided = experiment.method == "two_student" or (low, high) != (0.0, 0.0)
    if teacher.label_dropout == 0.0 and guided and not experiment.start_from:
        raise UserError(
            "config.teacher.label_dropout is 0, so the teacher never learns to predict without a "
            "condition, which guidance needs: make it greater than 0, such as 0.1"
        )


def _check_rounds(experiment: Experiment) -> None:
    model, halving = experiment.model, experiment.halving
    first, last = halving.first_num_steps, halving.last_num_steps
    if not halving.samplers:
        raise UserError(
            f"config.halving.samplers is empty; name at least one of {', '.join(JUMPS)}"
        )
    rounds = halving.rounds()
    if rounds[-1] != last or any(a != 2 * b for a, b in itertools.pairwise(rounds)):
        raise UserError(
            f"config.halving.first_num_steps is {first}, which can't be halved down to "
            f"config.halving.last_num_steps, {last}: make it {last} times a power of two"
        )
    if model.schedule in CHAINS and 2 * first > NUM_TIMESTEPS:
        raise UserError(
            f"config.halving.first_num_steps is {first}, whose teacher takes {2 * first} steps, but "
            f"config.model.schedule is {model.schedule}, a chain of {NUM_TIMESTEPS}: make it smaller"
        )
    if halving.round_steps and len(halving.round_steps) != len(rounds):
        raise UserError(
            f"config.halving.round_steps has {len(halving.round_steps)} numbers for {len(rounds)} "
            f"rounds, from {first} to {last}: give one for each, or none"
        )
    for num_steps in rounds:
        kinds.check(
            "config.halving.steps times few_step_factor",
            halving.updates(num_steps),
            kinds.Count,
        )


def loses_x(model: Model | ml_collections.ConfigDict) -> bool:
    """Whether at t = 1 an error of 0.01 in eps is one of more than 1 in x = (z - sigma eps) / alpha.

    Networks are no better than that, and data are about as large. By all weightings but snr, whose loss
    is the error of eps itself, t = 1 then drowns all other times.
    """
    return last_log_snr(model.schedule, model.schedule_options) < -2.0 * math.log(100.0)


def _check_predictions(experiment: Experiment) -> None:
    model, halving = experiment.model, experiment.halving
    to_one_step = halving.last_num_steps == 1 and set(halving.samplers) != {ENCODE}
    if model.parameterization == "eps" and loses_x(model):
        trained = set(STAGES)
        trained -= {"teacher"} if experiment.start_from else set()
        trained -= {"guidance"} if experiment.method != "guided" else set()
        for name in sorted(trained):
            weighting = getattr(experiment, name).weighting
            if weighting != "snr":
                raise UserError(
                    f"config.{name}.weighting is {weighting}, which magnifies errors of eps near t = 1 "
                    f"beyond all others: make it snr, or config.model.parameterization v"
                )
        if to_one_step:
            raise UserError(
                "config.halving.last_num_steps is 1, but at t = 1, all that a student of one step sees, "
                "eps says next to nothing of x: make it 2, or config.model.parameterization v"
            )
    elif halving.weighting == "snr" and model.schedule not in CHAINS and to_one_step:
        raise UserError(
            "config.halving.weighting is snr, which is zero at t = 1, all that a student of one step "
            "sees: choose another, or make config.halving.last_num_steps 2"
        )
    if model.parameterization == "x" and ENCODE in halving.samplers:
        raise UserError(
            f"config.halving.samplers holds {ENCODE}, but config.model.parameterization is x, which at "
            f"t = 0, where encoding begins, says nothing of eps: make it v, or take {ENCODE} out"
        )


def _check_stages(experiment: Experiment) -> None:
    if experiment.stage == AUTOENCODER and not experiment.autoencoder.steps:
        raise UserError(
            "config.stage is autoencoder, but config.autoencoder.steps is 0: set it, or choose another "
            "stage"
        )
    for name in STAGES if experiment.autoencoder.steps == 0 else (AUTOENCODER, *STAGES):
        stage = getattr(experiment, name)
        if stage.batch_size % stage.accumulation:
            raise UserError(
                f"config.{name}.accumulation is {stage.accumulation}, which doesn't divide "
                f"config.{name}.batch_size, {stage.batch_size}: choose one that does"
            )
        steps = stage.steps
        if name == "halving":
            steps = min(map(stage.updates, stage.rounds()))
        if stage.warmup_steps >= steps:
            raise UserError(
                f"config.{name}.warmup_steps is {stage.warmup_steps}, but the stage has only {steps} "
                f"updates by config.{name}: make the warm-up shorter"
            )


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
    _check_guidance,
    _check_rounds,
    _check_predictions,
    _check_stages,
    _check_cadence,
    _check_evaluation,
)


def check_extractor(where: str, name: str) -> None:
    """Raises UserError, naming the key or flag `where`, unless `name` is one of `EXTRACTORS`."""
    kind, _, path = name.partition(":")
    if not (name in EXTRACTORS or (path and f"{kind}:PATH" in EXTRACTORS)) or path == "PATH":
        raise UserError(f"{where} is {name!r}; choose one of {', '.join(EXTRACTORS)}")
