"""The conditions of an evaluation's samples, and how the samples and their paths are drawn."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from guided_distill.config import Evaluation
from guided_distill.data.source import Source
from guided_distill.diffusion.guidance import Condition
from guided_distill.evaluation.captions import captions_of
from guided_distill.evaluation.results import Row
from guided_distill.evaluation.tasks import Task
from guided_distill.runs.trained import Trained
from guided_distill.sampling.labels import cycling_labels, of_labels
from guided_distill.sampling.request import Request
from guided_distill.sampling.sample import predictions, sample_batches
from guided_distill.storage import npz_bytes
from guided_distill.text.encoder import TextEncoder

PATH_STEPS = 8
"""Students of at most this many steps have a path; a longer path is thinned to this many steps."""

PATH_IMAGES, PATH_POINTS = 2, 64
"""The number of samples whose path is drawn: images, or points."""


@dataclass(frozen=True)
class Subjects:
    """What n samples show: their condition [n, ...], the null condition, and their labels [n].

    captions: the texts [n] of the condition; None if it is not text.
    """

    condition: Condition
    null: Condition | None
    labels: np.ndarray
    captions: np.ndarray | None

    def first(self, count: int) -> Condition:
        """The condition of the first `count` samples."""
        return {name: each[:count] for name, each in self.condition.items()}


def subjects(test: Source, count: int, encoder: TextEncoder | None) -> Subjects:
    """`count` subjects, which cycle through the classes or, with a text encoder, the test captions.

    Raises UserError if there is a text encoder but the data have no captions.
    """
    if encoder is None:
        labels = cycling_labels(count, test.num_classes)
        return Subjects(of_labels(labels), None, labels, None)
    chosen = np.arange(count) % test.size
    captions = captions_of(test)[chosen]
    texts, text_of = np.unique(captions, return_inverse=True)
    states = encoder.encode(["", *texts.tolist()])
    return Subjects(
        condition={"text": states[1:][text_of]},
        null={"text": states[0]},
        labels=test.labels_of(chosen),
        captions=captions,
    )


@dataclass(frozen=True)
class Drawing:
    """How samples are drawn for every row: the subjects, the settings, and the decoder of latents.

    to_pixels: maps a sampler's output [n, ...] to images or points [n, ...].
    """

    subjects: Subjects
    settings: Evaluation
    to_pixels: Callable[[np.ndarray], np.ndarray]

    def draw(self, trained: Trained, row: Row, start: int) -> Iterator[np.ndarray]:
        """The row's samples from index `start` on, in batches. Compiles before it returns."""
        request = self._request(row)
        short = dataclasses.replace(request, condition=self.subjects.first(1), num_steps=1)
        self.to_pixels(next(sample_batches(trained, short)))
        return map(
            self.to_pixels, sample_batches(trained, dataclasses.replace(request, start=start))
        )

    def path(self, trained: Trained, row: Row) -> bytes:
        """An npz file of the x [k, n, ...] predicted at times t [k] for n samples with labels [n].

        t decreases from 1; the last x is the sample.
        """
        points = len(trained.description.data_shape) == 1
        count = min(PATH_POINTS if points else PATH_IMAGES, len(self.subjects.labels))
        request = dataclasses.replace(self._request(row), condition=self.subjects.first(count))
        x = predictions(trained, request)
        kept = np.unique(np.linspace(0, len(x) - 1, PATH_STEPS).round().astype(int))
        pixels = self.to_pixels(x[kept].reshape(-1, *x.shape[2:]))
        return npz_bytes(
            x=pixels.reshape(len(kept), count, *pixels.shape[1:]),
            t=1 - kept / len(x),
            label=self.subjects.labels[:count],
        )

    def has_path(self, task: Task) -> bool:
        """Whether the task's path is drawn: at the middle w, for few-step students and for the teacher.

        The teacher has a path only at its largest number of steps.
        """
        if task.w != middle(self.settings.weights):
            return False
        if task.stage.kind == "teacher":
            return task.num_steps == max(self.settings.teacher_num_steps)
        return task.stage.num_steps is not None and task.num_steps <= PATH_STEPS

    def _request(self, row: Row) -> Request:
        assert row.w is not None
        return Request(
            condition=self.subjects.condition,
            null=self.subjects.null,
            w=row.w,
            num_steps=row.num_steps,
            sampler=row.sampler,
            seed=self.settings.seed,
            batch_size=self.settings.batch_size,
            allow_untrained=True,
        )


def middle(weights: tuple[float, ...]) -> float:
    """The w to show where there is room for only one: the median, or the lower of the two middle ones."""
    return sorted(weights)[(len(weights) - 1) // 2]
