"""Sweeps: lists of points, each of which overrides keys of a config.

A point is a dictionary of overrides, such as {"guidance.w_max": 2.0}. A sweep is a function that takes
the config and returns a list of points, built with these functions:

    values("halving.steps", [100, 200])     a point for each value
    product(a, b)                           every point of a with every point of b
    zipped(a, b)                            the first of a with the first of b, and so on

and with `+`, which joins lists. Define a sweep beside get_config in a config file; those in ABLATIONS
work with any config.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from guided_distill.config import STAGES
from guided_distill.diffusion.process import PARAMETERIZATIONS
from guided_distill.diffusion.samplers import ENCODE
from guided_distill.diffusion.schedules import loses_x
from guided_distill.errors import UserError
from guided_distill.models.embeddings import W_FEATURES
from guided_distill.objectives.weighting import WEIGHTINGS

Point = Mapping[str, Any]
Sweep = Callable[[ConfigDict], list[Point]]


def values(key: str, choices: Iterable[Any]) -> list[Point]:
    """A point for each value of a key, such as "guidance.w_max"."""
    return [{key: choice} for choice in choices]


def product(*sweeps: list[Point]) -> list[Point]:
    """Every point of each sweep with every point of the others; the last sweep varies fastest."""
    return [_joined(points) for points in itertools.product(*sweeps)]


def zipped(*sweeps: list[Point]) -> list[Point]:
    """The i-th points of all sweeps, joined. Raises ValueError if the sweeps differ in length."""
    return [_joined(points) for points in zip(*sweeps, strict=True)]


def _joined(points: Iterable[Point]) -> Point:
    return {key: value for point in points for key, value in point.items()}


def name_of(point: Point) -> str:
    """The name of a point's folder: its keys with their values."""
    return ",".join(f"{key}={_words(value)}" for key, value in point.items()) or "base"


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "-".join(_words(each) for each in value)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(letter if letter.isalnum() or letter in "._+-" else "_" for letter in text)


def with_overrides(config: ConfigDict, point: Point) -> ConfigDict:
    """A copy of the config with a point's overrides. Raises UserError if one doesn't fit."""
    changed = config.copy_and_resolve_references()
    try:
        changed.update_from_flattened_dict(dict(point))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the sweep's point {name_of(point)} doesn't fit the config: {error}"
        ) from error
    return changed


def guidance_range(config: ConfigDict) -> list[Point]:
    """The range of w that a student is trained on; every student is measured at w = 1."""
    ranges = product(
        values("guidance.w_min", [0.0, 1.0]), values("guidance.w_max", [1.0, 2.0, 4.0, 8.0])
    )
    return product(ranges, values("evaluation.weights", [(1.0,)]))


def w_embedding(config: ConfigDict) -> list[Point]:
    """How the student is conditioned on w; the paper uses a Fourier embedding, as for time."""
    return values("guidance.w_embedding", tuple(W_FEATURES))


def loss_weighting(config: ConfigDict) -> list[Point]:
    """How the losses of stage one and stage two are weighted across noise levels.

    Stage two leaves out "snr" if it goes down to one step, where that weighting is zero.
    """
    to_one_step = config.halving.last_num_steps == 1
    of_halving = [name for name in WEIGHTINGS if not (to_one_step and name == "snr")]
    return values("guidance.weighting", WEIGHTINGS) + values("halving.weighting", of_halving)


def prediction_type(config: ConfigDict) -> list[Point]:
    """What all networks predict, including the teacher's.

    eps uses the one weighting that it can be trained with, and no one-step student if none could work; x
    has no encoders. config.py gives the reasons.
    """
    eps: dict[str, Any] = {
        f"{stage}.weighting": "snr" for stage in STAGES if "weighting" in config[stage]
    }
    model = config.model
    if config.halving.last_num_steps == 1 and loses_x(model.schedule, model.schedule_options):
        eps["halving.last_num_steps"] = 2
    samplers = tuple(name for name in config.halving.samplers if name != ENCODE)
    x = {"halving.samplers": samplers} if ENCODE in config.halving.samplers else {}
    more = {"eps": eps, "x": x}
    return [
        {"model.parameterization": name} | more.get(name, {})
        for name in PARAMETERIZATIONS
        if name != "x" or samplers
    ]


def updates_per_round(config: ConfigDict) -> list[Point]:
    """A quarter of, half of, all of and twice the updates of each halving round."""
    return values(
        "halving.steps", [max(1, int(config.halving.steps * f)) for f in (0.25, 0.5, 1, 2)]
    )


def fewer_halvings(config: ConfigDict) -> list[Point]:
    """Fewer rounds: halving goes directly from the stage-one student to N, N/2, N/4, ... steps."""
    first, last = config.halving.first_num_steps, config.halving.last_num_steps
    starts = [first >> shift for shift in range(first.bit_length()) if first >> shift >= last]
    return values("halving.first_num_steps", starts)


def student_sampler(config: ConfigDict) -> list[Point]:
    """Students of the deterministic sampler and of the stochastic one."""
    return values("halving.samplers", [("ddim",), ("stochastic",)])


def ablations(config: ConfigDict) -> list[Point]:
    """All of the ablations above, one after the other."""
    return [point for sweep in _SINGLE for point in sweep(config)]


_SINGLE: tuple[Sweep, ...] = (
    guidance_range,
    w_embedding,
    loss_weighting,
    prediction_type,
    updates_per_round,
    fewer_halvings,
    student_sampler,
)
ABLATIONS: dict[str, Sweep] = {sweep.__name__: sweep for sweep in (*_SINGLE, ablations)}
"""Ready-made ablations of Meng et al. 2023, by name."""
