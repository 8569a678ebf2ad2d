"""Requests for samples, checked against what the stage was trained for."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jax.typing import ArrayLike

from guided_distill import kinds
from guided_distill.diffusion import samplers
from guided_distill.diffusion.guidance import Condition
from guided_distill.diffusion.samplers import Known
from guided_distill.diffusion.schedules import CHAINS, NUM_TIMESTEPS
from guided_distill.errors import UserError
from guided_distill.runs.trained import Description


@dataclass(frozen=True)
class Options:
    """The user's choices of how to sample; None leaves a choice to the default. See `Request`."""

    w: float | None = None
    num_steps: int | None = None
    sampler: str | None = None
    seed: int = 0
    allow_untrained: bool = False

    def with_w(self, about: Description) -> Self:
        """These options, with the default w if none is chosen."""
        w = usual_w(about) if self.w is None else float(self.w)
        return dataclasses.replace(self, w=w)

    @property
    def keywords(self) -> dict[str, Any]:
        """Those of a `Request`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclass(frozen=True)
class Request:
    """A request for one sample for each example of `condition` [n, ...], from the index `start` on.

    w: the guidance weight, one for all or one [n] for each. null: the null condition, if a teacher needs
    one other than that of labels. num_steps, sampler: None for those that the stage was trained for.
    noise: the initial z at t = 1 [n, *data_shape], such as `encode` returns; None draws it. first: start
    at t = first/num_steps instead, with `noise` as the z at that time. known: what in-painting keeps,
    arrays [n, ...]. batch_size: the largest batch of a call. allow_untrained: allow a number of steps and
    a sampler that the stage wasn't trained for.

    Sample i depends on (seed, i), its condition, its noise and its w. n and batch_size affect only the
    shapes of the compiled program, and so at most the last digits.
    """

    condition: Condition
    w: ArrayLike
    null: Condition | None = None
    noise: np.ndarray | None = None
    first: int | None = None
    known: Known | None = None
    num_steps: int | None = None
    sampler: str | None = None
    seed: int = 0
    batch_size: int = 256
    start: int = 0
    allow_untrained: bool = False

    @property
    def count(self) -> int:
        """n, the number of examples."""
        return len(np.asarray(next(iter(self.condition.values()))))

    def resolved(self, num_steps: int, sampler: str) -> Self:
        """This request with a number of steps and a sampler."""
        return dataclasses.replace(self, num_steps=num_steps, sampler=sampler)


def check_request(about: Description, request: Request) -> Request:
    """Fill in the steps and the sampler. Raises UserError if the stage wasn't trained for the request."""
    if about.sampler == samplers.ENCODE:
        raise UserError(
            "this student was trained to encode images, not to sample: choose a stage of another "
            "sampler, such as halving_ddim_4"
        )
    num_steps, sampler = given_or_trained(
        about, num_steps=request.num_steps, sampler=request.sampler
    )
    _check_condition(about, request.condition)
    _check_w(about, request, flag="--w", way_out=", or add --allow_untrained")
    resolved = request.resolved(num_steps, sampler)
    if request.allow_untrained:
        return resolved
    if about.num_steps is not None and (num_steps, sampler) != (about.num_steps, about.sampler):
        raise UserError(
            f"this student was trained for {about.num_steps} steps of the {about.sampler} sampler, not "
            f"{num_steps} of {sampler}: leave --num_steps and --sampler out, or add --allow_untrained"
        )
    if about.num_steps is None and sampler == "stochastic":
        raise UserError(
            "--sampler stochastic needs a student that was trained for it: set "
            "config.halving.samplers to ('stochastic',) and train one"
        )
    return resolved


def given_or_trained(
    about: Description, *, num_steps: int | None, sampler: str | None
) -> tuple[int, str]:
    """The number of steps and the sampler; those that the stage was trained for by default.

    Raises UserError if no sampler can use them.
    """
    sampler = sampler or about.sampler or "ddim"
    if sampler not in samplers.SAMPLERS:
        raise UserError(f"--sampler is {sampler!r}; choose one of {', '.join(samplers.SAMPLERS)}")
    return _steps_or_trained(about, num_steps), sampler


def check_encoding(about: Description, request: Request) -> Request:
    """Fill in the steps of an encoding. Raises UserError if the stage can't encode this way."""
    if about.sampler not in (None, samplers.ENCODE):
        raise UserError(
            f"this student was trained to sample ({about.sampler}), not to encode: choose one of "
            f"config.halving.samplers=('encode',), such as halving_encode_4, or the guidance stage"
        )
    if about.model.parameterization == "x":
        raise UserError(
            "this network predicts x, which doesn't give eps at t = 0, where encoding begins: choose a "
            "run of config.model.parameterization v or eps"
        )
    num_steps = _steps_or_trained(about, request.num_steps)
    _check_condition(about, request.condition)
    _check_w(about, request, flag="--w_encode")
    if about.num_steps not in (None, num_steps):
        raise UserError(
            f"this student was trained to encode in {about.num_steps} steps, not in {num_steps}: leave "
            f"num_steps out"
        )
    return request.resolved(num_steps, samplers.ENCODE)


def usual_w(about: Description, wished: float = 1.0) -> float:
    """The default guidance weight: the trained one nearest to `wished`."""
    if about.w_min is None or about.w_max is None:
        return wished
    return min(max(wished, about.w_min), about.w_max)


def _steps_or_trained(about: Description, num_steps: int | None) -> int:
    if num_steps is None:
        return about.num_steps or about.experiment.default_num_steps
    kinds.check("--num_steps", num_steps, kinds.NumSteps)
    if about.model.schedule in CHAINS and num_steps > NUM_TIMESTEPS:
        raise UserError(
            f"--num_steps is {num_steps}, but this model's schedule, {about.model.schedule}, is a chain "
            f"of {NUM_TIMESTEPS} noise levels: give {NUM_TIMESTEPS} or less"
        )
    return num_steps


def _check_condition(about: Description, condition: Condition) -> None:
    for name, shape in about.condition_shapes.items():
        if name not in condition or np.shape(condition[name])[1:] != shape:
            raise ValueError(f"{name} must be [n, {', '.join(map(str, shape))}]")
    if "label" not in condition:
        return
    labels, num_classes = np.asarray(condition["label"]), len(about.class_names)
    if len(labels) == 0 or np.min(labels) < 0 or np.max(labels) >= num_classes:
        raise UserError(
            f"--labels must name classes in 0 ... {num_classes - 1}, at least one of them"
        )


def _check_w(about: Description, request: Request, *, flag: str, way_out: str = "") -> None:
    for w in map(float, np.unique(np.asarray(request.w))):
        kinds.check(flag, w, kinds.Weight)
        if about.w_min is None or about.w_max is None or request.allow_untrained:
            continue
        if not about.w_min <= w <= about.w_max:
            raise UserError(
                f"{flag} is {w}, outside the range [{about.w_min}, {about.w_max}] that this "
                f"{about.stage} student was trained on: choose a w in it{way_out}"
            )
