"""`samples/*_path.npz`: what a sampler's steps predict on the way to a few samples."""

from collections.abc import Callable

import numpy as np

from guided_distill.config import Evaluation
from guided_distill.evaluation.conditions import Subjects
from guided_distill.evaluation.tasks import Task
from guided_distill.runs.trained import Trained
from guided_distill.sampling.request import Request
from guided_distill.sampling.sample import predictions
from guided_distill.storage import npz_bytes

MOST_STEPS = 8
"""Students of at most so many steps have a path; of a longer one so many steps are kept."""

IMAGES, POINTS = 2, 64
"""How many samples have their path drawn."""


def has_path(task: Task, settings: Evaluation) -> bool:
    """Whether a row's path is drawn: few-step students and the teacher at most steps, at the middle w."""
    if task.w != middle(settings.weights):
        return False
    if task.stage.kind == "teacher":
        return task.num_steps == max(settings.teacher_num_steps)
    return task.stage.kind == "halving" and task.num_steps <= MOST_STEPS


def middle(weights: tuple[float, ...]) -> float:
    """The w that is shown where there is room for one; the lower of two."""
    return sorted(weights)[(len(weights) - 1) // 2]


def draw_path(
    trained: Trained,
    task: Task,
    wanted: Subjects,
    settings: Evaluation,
    to_pixels: Callable[[np.ndarray], np.ndarray],
) -> bytes:
    """An npz of x [k, n, ...], predicted at the times t [k] of n samples with label [n].

    t falls from 1; the last x is the sample.
    """
    points = len(trained.description.data_shape) == 1
    count = min(POINTS if points else IMAGES, len(wanted.labels))
    x = predictions(
        trained,
        Request(
            condition={name: each[:count] for name, each in wanted.condition.items()},
            null=wanted.null,
            w=task.w,
            num_steps=task.num_steps,
            sampler=task.sampler,
            seed=settings.seed,
            allow_untrained=True,
        ),
    )
    kept = np.unique(np.linspace(0, len(x) - 1, MOST_STEPS).round().astype(int))
    pixels = to_pixels(x[kept].reshape(-1, *x.shape[2:]))
    return npz_bytes(
        x=pixels.reshape(len(kept), count, *pixels.shape[1:]),
        t=1 - kept / task.num_steps,
        label=wanted.labels[:count],
    )
