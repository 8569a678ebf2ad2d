"""A run for the page: the stages that sample, and timed samples of one of them."""

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
    """Samples of a stage and their cost.

    samples: images [n, H, W, C] in [-1, 1] or points [n, 2]. num_steps: the steps that ran.
    network_calls: for one sample. seconds: for all samples, without compilation.
    """

    stage: str
    samples: np.ndarray
    num_steps: int
    network_calls: int
    seconds: float


@dataclass(frozen=True)
class PageRequest:
    """How to sample. labels (numbers of classes) or prompts: one for each sample."""

    w: float
    seed: int
    num_steps: int | None = None
    labels: Sequence[int] | None = None
    prompts: Sequence[str] | None = None

    @property
    def count(self) -> int:
        """The number of samples."""
        return len(self.labels or self.prompts or ())


@dataclass(frozen=True)
class _Loaded:
    model: api.Model
    compiled: set[tuple[str, int]] = field(default_factory=set)


class OpenRun:
    """A run whose stages are loaded when they are needed.

    stages: folders of the finished stages that sample, in the order of training. Raises UserError if
    there are none.
    """

    def __init__(self, workdir: epath.Path) -> None:
        self.workdir = workdir
        self.stages = finished_samplers(workdir)
        self.about = functools.cache(lambda stage: read_description(workdir / stage))
        # Two stages: the chosen one and the teacher beside it.
        self._loaded = functools.lru_cache(maxsize=2)(
            lambda stage: _Loaded(api.load(workdir / stage))
        )

    @property
    def has_teacher(self) -> bool:
        """Whether the run holds the teacher's weights; an exported run may hold students only."""
        return TEACHER in self.stages

    def image_shape(self, stage: str) -> tuple[int, ...]:
        """Height, width and channels of the images of a stage that is conditioned on text."""
        prompted = self._loaded(stage).model.prompted
        assert prompted is not None
        return prompted.image_shape

    def sample(self, stage: str, request: PageRequest) -> Drawn:
        """Draw samples. Raises UserError as `api.Model.sample` does."""

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
        """Edit an image [H, W, C] in [-1, 1]. Raises UserError as `api.Model.edit` does."""

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
        """In-paint an image [H, W, C] in [-1, 1] where mask, bool [H, W], is True.

        Raises UserError as `api.Model.inpaint` does.
        """

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
        """Time a call of `draw`. Before the first call of its kind, a call with one step compiles it.

        The compiled program serves any number of steps. draw(model, w, seed, num_steps, ...) returns
        samples and the number of steps that ran.
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
        calls = num_steps * calls_per_step(loaded.model.about)
        return Drawn(stage, samples, num_steps, calls, seconds)


def calls_per_step(about: Description) -> int:
    """Network calls per step: one if the network is conditioned on w, else two, to guide it."""
    return 1 if about.w_min is not None else 2


def _steps(model: api.Model, *, num_steps: int | None, **_: Any) -> int:
    return given_or_trained(model.about, num_steps=num_steps, sampler=None)[0]
