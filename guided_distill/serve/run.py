"""A run as the page sees it: the stages that sample, and what one of them draws, timed."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from etils import epath

from guided_distill import api
from guided_distill.runs.folder import finished_samplers
from guided_distill.runs.trained import Description, read_description
from guided_distill.sampling.request import given_or_trained

TEACHER = "teacher"
"""The teacher's folder in a run."""

_ONE_STEP = {"num_steps": 1, "allow_untrained": True}
_BATCH = 8
_BATCH_OF_POINTS = 256


@dataclass(frozen=True)
class Drawn:
    """What a stage drew, and what it took.

    samples: images [n, H, W, C] in [-1, 1] or points [n, 2]. num_steps: those that ran. network_calls:
    for one sample. seconds: for all of them, compiling apart.
    """

    stage: str
    samples: np.ndarray
    num_steps: int
    network_calls: int
    seconds: float


@dataclass(frozen=True)
class PageRequest:
    """How to sample. labels, classes' numbers, or prompts: one for each sample."""

    w: float
    seed: int
    num_steps: int | None = None
    labels: Sequence[int] | None = None
    prompts: Sequence[str] | None = None

    @property
    def count(self) -> int:
        """How many samples."""
        return len(self.labels or self.prompts or ())


@dataclass(frozen=True)
class _Loaded:
    model: api.Model
    compiled: set[tuple[str, int]] = field(default_factory=set)


class OpenRun:
    """A run whose stages are read when they are asked for.

    stages: folders of the finished ones that sample, in the order of training. Raises UserError if
    there is none.
    """

    def __init__(self, workdir: epath.Path) -> None:
        self.workdir = workdir
        self.stages = finished_samplers(workdir)
        self.about = functools.cache(lambda stage: read_description(workdir / stage))
        # The chosen one and the teacher beside it.
        self._loaded = functools.lru_cache(maxsize=2)(
            lambda stage: _Loaded(api.load(workdir / stage))
        )

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher's own weights are there: given-away runs may hold students alone."""
        return TEACHER in self.stages

    def image_shape(self, stage: str) -> tuple[int, ...]:
        """Height, width and channels of the images of a stage that is conditioned on texts."""
        prompted = self._loaded(stage).model.prompted
        assert prompted is not None
        return prompted.image_shape

    def sample(self, stage: str, request: PageRequest) -> Drawn:
        """Raises UserError as `api.Model.sample` does."""

        def draw(model: api.Model, **how: Any) -> tuple[np.ndarray, int]:
            most = _BATCH_OF_POINTS if len(model.about.data_shape) == 1 else _BATCH
            samples = model.sample(
                labels=request.labels,
                prompts=request.prompts,
                batch_size=min(most, request.count),
                **how,
            )
            return samples, _steps(model, **how)

        return self._timed("sample", stage, request, draw, _ONE_STEP)

    def edit(
        self, stage: str, request: PageRequest, image: np.ndarray, *, strength: float
    ) -> Drawn:
        """Raises UserError as `api.Model.edit` does. image: [H, W, C] in [-1, 1]."""

        def draw(
            model: api.Model, strength: float = strength, **how: Any
        ) -> tuple[np.ndarray, int]:
            images = np.repeat(image[None], request.count, axis=0)
            edited = model.edit(images, request.prompts or (), strength=strength, **how)
            return edited, int(strength * _steps(model, **how))

        return self._timed("edit", stage, request, draw, {**_ONE_STEP, "strength": 1.0})

    def inpaint(
        self, stage: str, request: PageRequest, image: np.ndarray, mask: np.ndarray
    ) -> Drawn:
        """Raises UserError as `api.Model.inpaint` does. mask: bool [H, W], True where to paint."""

        def draw(model: api.Model, **how: Any) -> tuple[np.ndarray, int]:
            images, masks = (np.repeat(each[None], request.count, axis=0) for each in (image, mask))
            painted = model.inpaint(images, masks, request.prompts or (), **how)
            return painted, _steps(model, **how)

        return self._timed("inpaint", stage, request, draw, _ONE_STEP)

    def _timed(
        self,
        verb: str,
        stage: str,
        request: PageRequest,
        draw: Callable[..., tuple[np.ndarray, int]],
        one_step: Mapping[str, Any],
    ) -> Drawn:
        """What `draw` makes and how long it took, after a draw of one step if this is the first.

        That one compiles, for any number of steps. draw(model, w, seed, num_steps, ...): the samples,
        and the steps that made them.
        """
        loaded = self._loaded(stage)
        how = {"w": request.w, "seed": request.seed}
        kind = (verb, request.count)
        if kind not in loaded.compiled:
            draw(loaded.model, **how, **one_step)
            loaded.compiled.add(kind)
        start = time.perf_counter()
        samples, num_steps = draw(loaded.model, **how, num_steps=request.num_steps)
        seconds = time.perf_counter() - start
        calls = num_steps * calls_in_a_step(loaded.model.about)
        return Drawn(stage, samples, num_steps, calls, seconds)


def calls_in_a_step(about: Description) -> int:
    """Network calls: a network that takes w has guidance inside, another is called twice."""
    return 1 if about.w_min is not None else 2


def _steps(model: api.Model, *, num_steps: int | None, **_: Any) -> int:
    return given_or_trained(model.about, num_steps=num_steps, sampler=None)[0]
