"""A run's configuration: typed, with its defaults, and checked; every error names the key.

Config files start from `default_config()` and change what they need; `parse` turns the ConfigDict
into the frozen dataclasses below, which is what the rest of the package reads.
"""

import dataclasses
import inspect
import itertools
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_collections

from guided_distill.diffusion.process import PARAMETERIZATIONS
from guided_distill.diffusion.samplers import ENCODE, SAMPLERS
from guided_distill.diffusion.schedules import CHAINS, NUM_TIMESTEPS, SCHEDULES
from guided_distill.draws import check_seed
from guided_distill.errors import UserError
from guided_distill.objectives.halving import JUMPS
from guided_distill.objectives.weighting import WEIGHTINGS

STAGES = ("teacher", "guidance", "halving")
AUTOENCODER = "autoencoder"
METHODS = ("guided", "naive", "two_student")
LEARNING_RATE_SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("float32", "bfloat16")
W_EMBEDDINGS = ("fourier", "scalar")
EXTRACTORS = ("classifier", "lite0", "lite0:PATH", "inception:PATH", "clip:PATH")


def _one_of(*names: str) -> Any:
    """A field whose value must be one of `names`; the first is the default."""
    return field(default=names[0], metadata={"choices": names})


@dataclass(frozen=True)
class Data:
    """Where examples come from: a name of guided_distill.data.sources.

    channels: what the data must have, 1 for gray and 3 for colour; None takes it as it comes.
    text_encoder: a name of guided_distill.text.load to condition on the data's captions by; None
    conditions on their labels. shape, condition: what an example and its condition are like, such as
    (64, 64, 4) and {"text": (77, 768)}, or {"label": 10} for the number of classes: what a plan asks when
    the data aren't there, and checked when they are; an empty shape takes them as they come.
    """

    name: str = "digits"
    image_size: int | None = None
    channels: int | None = None
    flip: bool = False
    text_encoder: str | None = None
    shape: tuple[int, ...] = ()
    condition: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """The network: a name of guided_distill.models.registry, and that class's own fields as options.

    schedule_options: what the schedule's function in guided_distill.diffusion.schedules takes.
    """

    name: str = "mlp"
    parameterization: str = _one_of("v", *PARAMETERIZATIONS)
    schedule: str = _one_of("cosine", *SCHEDULES)
    schedule_options: dict[str, float] = field(default_factory=dict)
    dtype: str = _one_of(*DTYPES)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Optimization:
    """How a stage is trained. An ema_decay of 0 keeps no average: the raw weights are the result.

    accumulation: in how many parts, one after the other, the gradient of a batch is computed.
    """

    steps: int = 1000
    batch_size: int = 128
    accumulation: int = 1
    learning_rate: float = 1e-3
    learning_rate_schedule: str = _one_of(*LEARNING_RATE_SCHEDULES)
    warmup_steps: int = 0
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    ema_decay: float = 0.0


@dataclass(frozen=True)
class Autoencoder(Optimization):
    """The run's own autoencoder, whose latents are then diffused; steps = 0 diffuses the data itself.

    options: fields of guided_distill.models.stable_diffusion.autoencoder.AutoencoderKL.
    """

    steps: int = 0
    kl_weight: float = 1e-3
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Teacher(Optimization):
    """The guided diffusion model: conditional and unconditional in one network.

    label_dropout: the share of examples that lose their condition, be it a label or a text.
    initial: the folder of another run's teacher to start from, whatever it predicts: so one of eps
    becomes one of v.
    """

    weighting: str = _one_of("snr_plus_one", *WEIGHTINGS)
    label_dropout: float = 0.1
    dropout: float = 0.0
    initial: str | None = None


@dataclass(frozen=True)
class Guidance(Optimization):
    """Stage one. The w range is the student's for good: the later rounds and samplers keep to it.

    w_embedding, the student's for good too: how the network is told w, "fourier" as it is told time (the
    paper's way, and the one that diffusers knows), or "scalar" as the number itself.
    clipped, here and in Halving: distill the teacher as samplers of images use it, with its x held to
    [-1, 1]; not in the papers.
    """

    weighting: str = _one_of("snr", *WEIGHTINGS)
    clipped: bool = False
    w_min: float = 0.0
    w_max: float = 4.0
    w_embedding: str = _one_of(*W_EMBEDDINGS)


@dataclass(frozen=True)
class Halving(Optimization):
    """Stage two: rounds of N = first_num_steps, half of it, ... last_num_steps.

    few_step_factor multiplies the updates of the rounds N = 2 and N = 1; round_steps, where it isn't
    empty, is the updates of every round in turn. Each of `samplers` gets its own chain of students, for
    they are trained on different jumps.
    """

    weighting: str = _one_of("truncated_snr", *WEIGHTINGS)
    clipped: bool = False
    first_num_steps: int = 32
    last_num_steps: int = 1
    few_step_factor: int = 2
    round_steps: tuple[int, ...] = ()
    samplers: tuple[str, ...] = ("ddim",)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measures: every student at its own N, and the teacher by these samplers.

    extractor: what it looks through, one of `EXTRACTORS`.
    """

    extractor: str = "classifier"
    num_samples: int = 1024
    batch_size: int = 256
    weights: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0)
    teacher_samplers: tuple[str, ...] = ("ddim",)
    teacher_num_steps: tuple[int, ...] = (1, 2, 4, 8, 16, 64)
    seed: int = 0


@dataclass(frozen=True)
class Cadence:
    """How a training runs, whatever it trains."""

    steps_per_dispatch: int
    log_every: int
    checkpoint_every: int
    checkpoints_to_keep: int
    max_nonfinite_steps: int


@dataclass(frozen=True)
class Experiment:
    """A whole run.

    method: "guided" is the paper's: stage one, then halving. Its baselines go without stage one: "naive"
    halves the steps of the guided teacher directly; "two_student" halves those of its conditional and
    unconditional branches apart, and guides the student when it is sampled.
    stage: "all", or the one stage that `train` should run. start_from: the folder of a finished stage
    of another run, to distill a teacher that was trained elsewhere. fsdp: over how many devices weights
    and optimizer are split, 0 for all; of several slices, those of one (guided_distill/training/mesh.py).
    """

    seed: int = 0
    method: str = _one_of(*METHODS)
    stage: str = _one_of("all", AUTOENCODER, *STAGES)
    start_from: str | None = None
    fsdp: int = 1
    steps_per_dispatch: int = 50
    log_every: int = 100
    checkpoint_every: int = 1000
    checkpoints_to_keep: int = 2
    max_nonfinite_steps: int = 10
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

    def rounds(self) -> tuple[int, ...]:
        """The N of every halving round, falling."""
        rounds = [self.halving.first_num_steps]
        while rounds[-1] > self.halving.last_num_steps:
            rounds.append(rounds[-1] // 2)
        return tuple(rounds)

    def round_steps(self, num_steps: int) -> int:
        """Updates of the round that ends at `num_steps`."""
        if self.halving.round_steps:
            return self.halving.round_steps[self.rounds().index(num_steps)]
        return self.halving.steps * (self.halving.few_step_factor if num_steps <= 2 else 1)


RESUMABLE_CHANGES = (
    "stage",
    "fsdp",
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
    hints = typing.get_type_hints(type(section))
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        if dataclasses.is_dataclass(value):
            config[entry.name] = _config_dict_of(value)
        elif value is None:
            config[entry.name] = ml_collections.config_dict.placeholder(
                _without_none(hints[entry.name])
            )
        else:
            config[entry.name] = value
    return config


def parse(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Experiment:
    """Check a config and freeze it. Raises UserError, naming the key, for anything amiss."""
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    experiment = _parse_section(Experiment, values, "")
    _check(experiment)
    return experiment


def changed_keys(old: Experiment, new: Experiment) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ and make other weights, each with its (old, new) value."""
    changes = differences(dataclasses.asdict(old), dataclasses.asdict(new))
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


def _parse_section(kind: type, values: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    entries = {entry.name: entry for entry in dataclasses.fields(kind)}
    unknown = sorted(values.keys() - entries.keys())
    if unknown:
        raise UserError(
            f"config.{prefix}{unknown[0]} is not a key; those of config.{prefix.rstrip('.')} are "
            f"{', '.join(sorted(entries))}".replace("config. ", "config ")
        )
    parsed = {
        name: _parse_value(hints[name], entries[name], value, prefix)
        for name, value in values.items()
    }
    return kind(**parsed)


def _without_none(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _parse_value(hint: Any, entry: dataclasses.Field, value: Any, prefix: str) -> Any:
    key = f"config.{prefix}{entry.name}"
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{key} must be a section with keys of its own, not {value!r}")
        return _parse_section(typing.cast(type, hint), value, f"{prefix}{entry.name}.")
    if value is None and _without_none(hint) is not hint:
        return None
    hint = _without_none(hint)
    if typing.get_origin(hint) is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{key} must be a section with keys of its own, not {value!r}")
        return {
            name: tuple(each) if isinstance(each, list | tuple) else each
            for name, each in value.items()
        }
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{key} must be a tuple, not {value!r}")
        kind = typing.get_args(hint)[0]
        return tuple(_parse_scalar(kind, each, key) for each in value)
    value = _parse_scalar(hint, value, key)
    choices = dict.fromkeys(entry.metadata.get("choices", ()))
    if choices and value not in choices:
        raise UserError(f"{key} is {value!r}; choose one of {', '.join(choices)}")
    return value


def _parse_scalar(kind: type, value: Any, key: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{key} must be {_NAMES[kind]}, not {value!r}")
    return value


_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "True or False"}


def _check(experiment: Experiment) -> None:
    """Rules on values, alone and together."""
    model = experiment.model
    options = inspect.signature(SCHEDULES[model.schedule]).parameters
    for option in model.schedule_options:
        if option not in options:
            raise UserError(
                f"config.model.schedule_options.{option} is not an option of {model.schedule}; it has "
                f"{', '.join(options)}"
            )
    low, high = experiment.guidance.w_min, experiment.guidance.w_max
    if low > high:
        raise UserError(
            f"config.guidance.w_min is {low}, above config.guidance.w_max, which is {high}: swap them"
        )
    first, last = experiment.halving.first_num_steps, experiment.halving.last_num_steps
    _positive("halving.last_num_steps", last)
    _positive("halving.few_step_factor", experiment.halving.few_step_factor)
    if not experiment.halving.samplers:
        raise UserError(
            f"config.halving.samplers is empty; name at least one of {', '.join(JUMPS)}"
        )
    rounds = experiment.rounds()
    if rounds[-1] != last or any(a != 2 * b for a, b in itertools.pairwise(rounds)):
        raise UserError(
            f"config.halving.first_num_steps is {first}, which can't be halved down to "
            f"config.halving.last_num_steps, {last}: make it {last} times a power of two"
        )
    blind = experiment.halving.weighting == "snr" and model.schedule not in CHAINS
    if blind and last == 1 and set(experiment.halving.samplers) - {ENCODE}:
        raise UserError(
            "config.halving.weighting is snr, which is zero at t = 1, all that a student of one step "
            "sees: choose another, or make config.halving.last_num_steps 2"
        )
    if model.schedule in CHAINS and 2 * first > NUM_TIMESTEPS:
        raise UserError(
            f"config.halving.first_num_steps is {first}, whose teacher takes {2 * first} steps, but "
            f"config.model.schedule is {model.schedule}, a chain of {NUM_TIMESTEPS}: make it smaller"
        )
    if experiment.stage == AUTOENCODER and not experiment.autoencoder.steps:
        raise UserError(
            "config.stage is autoencoder, but config.autoencoder.steps is 0: set it, or choose another "
            "stage"
        )
    if experiment.halving.round_steps:
        if len(experiment.halving.round_steps) != len(rounds):
            raise UserError(
                f"config.halving.round_steps has {len(experiment.halving.round_steps)} numbers for "
                f"{len(rounds)} rounds, from {first} to {last}: give one for each, or none"
            )
        _positive("halving.round_steps", min(experiment.halving.round_steps))
    for name in STAGES if experiment.autoencoder.steps == 0 else (AUTOENCODER, *STAGES):
        stage = getattr(experiment, name)
        _positive(f"{name}.steps", stage.steps)
        _positive(f"{name}.batch_size", stage.batch_size)
        _positive(f"{name}.accumulation", stage.accumulation)
        if stage.batch_size % stage.accumulation:
            raise UserError(
                f"config.{name}.accumulation is {stage.accumulation}, which doesn't divide "
                f"config.{name}.batch_size, {stage.batch_size}: choose one that does"
            )
        _positive(f"{name}.learning_rate", stage.learning_rate)
        _positive(f"{name}.gradient_clip", stage.gradient_clip)
        _fraction(f"{name}.ema_decay", stage.ema_decay)
        steps = stage.steps
        if name == "halving":
            steps = min(map(experiment.round_steps, rounds))
        if stage.warmup_steps >= steps:
            raise UserError(
                f"config.{name}.warmup_steps is {stage.warmup_steps}, but the stage has only {steps} "
                f"updates by config.{name}: make the warm-up shorter"
            )
    check_seed("config.seed", experiment.seed)
    check_seed("config.evaluation.seed", experiment.evaluation.seed)
    _fraction("teacher.label_dropout", experiment.teacher.label_dropout)
    _fraction("teacher.dropout", experiment.teacher.dropout)
    for key, value in dataclasses.asdict(experiment.cadence).items():
        _positive(key, value)
    for key, unit in (("log_every", "steps_per_dispatch"), ("checkpoint_every", "log_every")):
        value, multiple_of = getattr(experiment, key), getattr(experiment, unit)
        if value % multiple_of:
            raise UserError(
                f"config.{key} is {value}; make it a multiple of config.{unit}, {multiple_of}"
            )
    _each_known("halving.samplers", experiment.halving.samplers, JUMPS)
    _each_known("evaluation.teacher_samplers", experiment.evaluation.teacher_samplers, SAMPLERS)
    if "stochastic" in experiment.evaluation.teacher_samplers:
        raise UserError(
            "config.evaluation.teacher_samplers holds stochastic, which only a student trained for it "
            "can use: take it out"
        )
    check_extractor("config.evaluation.extractor", experiment.evaluation.extractor)
    _positive("evaluation.num_samples", experiment.evaluation.num_samples)
    _positive("evaluation.batch_size", experiment.evaluation.batch_size)
    for num_steps in experiment.evaluation.teacher_num_steps:
        _positive("evaluation.teacher_num_steps", num_steps)
        if model.schedule in CHAINS and num_steps > NUM_TIMESTEPS:
            raise UserError(
                f"config.evaluation.teacher_num_steps holds {num_steps}, but config.model.schedule is "
                f"{model.schedule}, a chain of {NUM_TIMESTEPS}: make it {NUM_TIMESTEPS} or less"
            )
    for w in experiment.evaluation.weights:
        if not low <= w <= high:
            raise UserError(
                f"config.evaluation.weights holds {w}, outside the trained range [{low}, {high}] of "
                f"config.guidance.w_min and w_max: take it out or widen the range"
            )


def check_extractor(where: str, name: str) -> None:
    """Raises UserError, naming the key or flag `where`, unless `name` is one of `EXTRACTORS`."""
    kind, _, path = name.partition(":")
    if not (name in EXTRACTORS or (path and f"{kind}:PATH" in EXTRACTORS)) or path == "PATH":
        raise UserError(f"{where} is {name!r}; choose one of {', '.join(EXTRACTORS)}")


def _positive(key: str, value: float) -> None:
    if not value > 0:  # Not a number is not greater either.
        raise UserError(f"config.{key} is {value}; make it greater than 0")


def _fraction(key: str, value: float) -> None:
    if not 0 <= value < 1:
        raise UserError(f"config.{key} is {value}; make it at least 0 and below 1")


def _each_known(key: str, names: tuple[str, ...], known: Mapping[str, Any]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"config.{key} holds {name!r}; choose from {', '.join(known)}")
