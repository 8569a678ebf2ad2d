"""Measure every student of a run, and its teacher at many steps, against the training data."""

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from guided_distill.config import Evaluation, Experiment, check_extractor
from guided_distill.data import sources
from guided_distill.diffusion.samplers import ENCODE
from guided_distill.errors import UserError
from guided_distill.evaluation.measures import caveats, measure
from guided_distill.evaluation.reference import (
    MAX_EXAMPLES,
    read_reference,
    training_reference,
)
from guided_distill.evaluation.registry import load_extractor
from guided_distill.evaluation.results import Result, metric_name, read_results, write_results
from guided_distill.evaluation.round_trip import evaluate_round_trips
from guided_distill.pipeline import read_config
from guided_distill.sampling import cycling_labels, sample_batches
from guided_distill.stages import Stage, all_stages
from guided_distill.training.progress import console, progress
from guided_distill.training.trained import Trained, load_finished

KEPT_SAMPLES = 64
"""How many of each row's samples are kept for pictures."""


FEWEST_SAMPLES = 4
"""A ball of precision and recall reaches to the third of the other samples."""

Chunks = Iterator[tuple[np.ndarray, np.ndarray]]
"""Samples [n, ...] and their classes [n], some at a time."""


class Row(NamedTuple):
    """The first columns of `results.csv`."""

    stage: str
    sampler: str | None
    num_steps: int | None
    w: float | None


@dataclass(frozen=True)
class Request:
    """What the command line asks for in place of the config; None leaves a thing as it is there.

    stages: folders of the workdir, for all of them. num_steps: the teacher's. reference: a file of
    statistics, in place of the training data's.
    """

    extractor: str | None = None
    num_samples: int | None = None
    weights: tuple[float, ...] | None = None
    stages: tuple[str, ...] | None = None
    num_steps: tuple[int, ...] | None = None
    reference: epath.Path | None = None


@dataclass(frozen=True)
class Task:
    """One row to measure."""

    stage: Stage
    sampler: str
    num_steps: int
    w: float

    @property
    def row(self) -> Row:
        """What tells its row from others."""
        return Row(self.stage.kind, self.sampler, self.num_steps, self.w)

    @property
    def samples_name(self) -> str:
        """Where its first samples are kept."""
        return f"{self.stage.kind}_{self.sampler}_{self.num_steps}_w{self.w:g}.npz"

    @property
    def network_calls(self) -> int:
        """For one sample: a network that doesn't take w is called twice a step."""
        return self.num_steps * (1 if self.stage.takes_w else 2)


def evaluate(workdir: epath.Path, request: Request | None = None) -> list[Result]:
    """Write `results.csv`, row by row, and `round_trip.csv`; rows that are there already are kept.

    Raises UserError if the folder holds no run or an unfinished one, or for what the request names.
    """
    request = request or Request()
    experiment = read_config(workdir)
    settings, data = _settings(experiment, request), experiment.data
    train, test = (
        sources.load(data.name, split=split, image_size=data.image_size, seed=experiment.seed)
        for split in ("train", "test")
    )
    tasks = list(_tasks(_stages(workdir, experiment, request), experiment, settings))
    extractor = load_extractor(settings.extractor, train, workdir)
    if request.reference is None:
        reference = training_reference(train, extractor, workdir / "reference")
    else:
        reference = read_reference(request.reference, train, extractor)
    for line in caveats(settings.num_samples, extractor.width):
        console.print(line, highlight=False, markup=False)

    path = workdir / "results.csv"
    results = read_results(path)
    name = f"{extractor.name}@{reference.of}" if reference.of else extractor.name

    def known(row: Row, count: int) -> bool:
        key = (*row, count, settings.seed, name)
        return any(result.key == key for result in results)

    def add(
        row: Row,
        chunks: Chunks,
        count: int,
        clock: "_Clock | None" = None,
        calls: int | None = None,
    ) -> Result:
        measures = measure(chunks, count=count, extractor=extractor, reference=reference)
        result = Result(
            *row,
            **dataclasses.asdict(measures),
            seed=settings.seed,
            seconds=clock.seconds if clock else None,
            network_calls=calls,
            extractor=name,
        )
        results.append(result)
        write_results(path, results)
        return result

    real, count = Row("real", None, None, None), min(test.size, MAX_EXAMPLES)
    if not known(real, count):
        add(real, test.chunks(MAX_EXAMPLES), count)
    labels = cycling_labels(settings.num_samples, train.num_classes)
    loaded: Trained | None = None
    with progress("evaluation", total=len(tasks), unit="rows") as advance:
        for done, task in enumerate(tasks, start=1):
            words = ""
            if not known(task.row, len(labels)):
                directory = workdir / task.stage.name
                if loaded is None or loaded.path != str(directory):
                    loaded = load_finished(directory)
                clock = _Clock(_drawn(loaded, task, labels, settings))
                chunks = _keeping(workdir / "samples" / task.samples_name, clock)
                result = add(task.row, chunks, len(labels), clock, task.network_calls)
                words = (
                    f"{task.stage.name} {task.sampler} N={task.num_steps} w={task.w:g}: "
                    f"{metric_name('fd', name)} {result.fd:.3f} of n={result.n}"
                )
            advance(done, words)
    if request.stages is None:
        evaluate_round_trips(workdir, settings)
    return results


def _settings(experiment: Experiment, request: Request) -> Evaluation:
    """The config's, with what the request replaces. Raises UserError, naming the flag."""
    changes: dict[str, Any] = {
        "extractor": request.extractor,
        "num_samples": request.num_samples,
        "weights": request.weights,
        "teacher_num_steps": request.num_steps,
    }
    settings = dataclasses.replace(
        experiment.evaluation,
        **{key: value for key, value in changes.items() if value is not None},
    )
    check_extractor("--extractor", settings.extractor)
    if request.reference is not None and not request.reference.is_file():
        raise UserError(
            f"--reference {request.reference} is not a file: name one of statistics, .npz"
        )
    if settings.num_samples < FEWEST_SAMPLES:
        raise UserError(
            f"--num_samples is {settings.num_samples}: measure at least {FEWEST_SAMPLES} samples"
        )
    if min(settings.teacher_num_steps, default=1) < 1:
        raise UserError(f"--num_steps holds {min(settings.teacher_num_steps)}: a step is the least")
    low, high = experiment.guidance.w_min, experiment.guidance.w_max
    for w in settings.weights:
        if not low <= w <= high:
            raise UserError(
                f"--w holds {w}, outside the range [{low}, {high}] that the students were trained on"
            )
    return settings


def _stages(workdir: epath.Path, experiment: Experiment, request: Request) -> list[Stage]:
    """The stages to measure. Raises UserError if there is none, or one that was asked for is not."""
    stages = [stage for stage in all_stages(experiment) if (workdir / stage.name).exists()]
    if not stages:
        raise UserError(f"{workdir} has no trained stage: run `guided-distill train` on it first")
    names = [stage.name for stage in stages]
    for name in request.stages or ():
        if name not in names:
            raise UserError(
                f"--stages names {name}, which {workdir} has not: choose from {', '.join(names)}"
            )
    return [stage for stage in stages if request.stages is None or stage.name in request.stages]


def _tasks(stages: list[Stage], experiment: Experiment, settings: Evaluation) -> Iterator[Task]:
    for stage in stages:
        if stage.sampler == ENCODE:
            continue
        if stage.kind == "teacher":
            grids = [
                (sampler, num_steps)
                for sampler in settings.teacher_samplers
                for num_steps in settings.teacher_num_steps
            ]
        elif stage.kind == "guidance":
            grids = [("ddim", 2 * experiment.halving.first_num_steps)]
        else:
            grids = [(str(stage.sampler), int(stage.num_steps or 0))]
        for sampler, num_steps in grids:
            for w in settings.weights:
                yield Task(stage, sampler, num_steps, w)


def _drawn(trained: Trained, task: Task, labels: np.ndarray, settings: Evaluation) -> Chunks:
    """The task's samples, by a sampler that is compiled already."""

    def draw(labels: np.ndarray, num_steps: int) -> Iterator[np.ndarray]:
        return sample_batches(
            trained,
            labels=labels,
            w=task.w,
            num_steps=num_steps,
            sampler=task.sampler,
            seed=settings.seed,
            batch_size=settings.batch_size,
            allow_untrained=True,
        )

    next(draw(labels[:1], 1))
    return _with_labels(draw(labels, task.num_steps), labels)


def _with_labels(chunks: Iterator[np.ndarray], labels: np.ndarray) -> Chunks:
    start = 0
    for samples in chunks:
        yield samples, labels[start : start + len(samples)]
        start += len(samples)


class _Clock:
    """Hands on what an iterator makes, and counts the seconds that it takes to make it."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks
        self.seconds = 0.0

    def __iter__(self) -> Chunks:
        return self

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        start = time.perf_counter()
        chunk = next(self._chunks)
        self.seconds += time.perf_counter() - start
        return chunk


def _keeping(path: epath.Path, chunks: Chunks) -> Chunks:
    """Hands on the samples, and saves the first few for pictures."""
    images: list[np.ndarray] = []
    classes: list[np.ndarray] = []
    for samples, labels in chunks:
        if sum(map(len, images)) < KEPT_SAMPLES:
            images.append(samples)
            classes.append(labels)
        yield samples, labels
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez_compressed(
            file,
            image=np.concatenate(images)[:KEPT_SAMPLES],
            label=np.concatenate(classes)[:KEPT_SAMPLES],
        )
