"""Measure every student of a run, and its teacher at many steps, against the training data."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from etils import epath

from guided_distill.config import Evaluation
from guided_distill.data import sources
from guided_distill.data.source import Source
from guided_distill.diffusion.samplers import ENCODE
from guided_distill.errors import UserError
from guided_distill.evaluation.extractor import Extractor, train_extractor
from guided_distill.evaluation.frechet import FeatureStatistics, frechet_distance
from guided_distill.evaluation.kid import kernel_distance
from guided_distill.evaluation.precision_recall import Manifold, precision_recall
from guided_distill.evaluation.results import Result, read_results, write_results
from guided_distill.pipeline import read_config
from guided_distill.sampling import cycling_labels, sample
from guided_distill.stages import Stage, all_stages
from guided_distill.training.progress import progress
from guided_distill.training.trained import Trained, load_finished

KEPT_SAMPLES = 64
"""How many of each row's samples are kept for pictures."""

MAX_REFERENCE = 50_000


@dataclass(frozen=True)
class Task:
    """One row to measure."""

    stage: Stage
    sampler: str
    num_steps: int
    w: float

    @property
    def samples_name(self) -> str:
        """Where its first samples are kept."""
        return f"{self.stage.kind}_{self.sampler}_{self.num_steps}_w{self.w:g}.npz"

    @property
    def network_calls(self) -> int:
        """For one sample: a teacher is called twice a step."""
        return self.num_steps * (2 if self.stage.kind == "teacher" else 1)


def evaluate(workdir: epath.Path) -> list[Result]:
    """Write `results.csv`, row by row; rows that are there already are kept.

    Raises UserError if the folder holds no run or an unfinished one.
    """
    experiment = read_config(workdir)
    settings, data = experiment.evaluation, experiment.data
    train, test = (
        sources.load(data.name, split=split, image_size=data.image_size, seed=experiment.seed)
        for split in ("train", "test")
    )
    stages = [stage for stage in all_stages(experiment) if (workdir / stage.name).exists()]
    if not stages:
        raise UserError(f"{workdir} has no trained stage: run `guided-distill train` on it first")
    extractor = train_extractor(train, workdir / "classifier")
    reference = Reference(train, extractor)
    path = workdir / "results.csv"
    results = read_results(path)
    known = {result.key for result in results}

    def add(result: Result) -> None:
        results.append(result)
        write_results(path, results)

    if not any(result.stage == "real" for result in results):
        images, labels = test.arrays(MAX_REFERENCE)
        add(reference.measure(images, labels, stage="real", seed=settings.seed))
    labels = cycling_labels(settings.num_samples, train.num_classes)
    tasks = list(_tasks(stages, experiment.evaluation, 2 * experiment.halving.first_num_steps))
    loaded: Trained | None = None
    with progress("evaluation", total=len(tasks), unit="rows") as advance:
        for done, task in enumerate(tasks, start=1):
            key = (
                task.stage.kind,
                task.sampler,
                task.num_steps,
                task.w,
                settings.num_samples,
                settings.seed,
                extractor.name,
            )
            if key not in known:
                directory = workdir / task.stage.name
                if loaded is None or loaded.path != str(directory):
                    loaded = load_finished(directory)
                images, seconds = _timed_samples(loaded, task, labels, settings)
                result = reference.measure(
                    images,
                    labels,
                    stage=task.stage.kind,
                    sampler=task.sampler,
                    num_steps=task.num_steps,
                    w=task.w,
                    seed=settings.seed,
                    seconds=seconds,
                    network_calls=task.network_calls,
                )
                _keep(workdir / "samples" / task.samples_name, images, labels)
                add(result)
                words = f"{task.stage.name} {task.sampler} N={task.num_steps} w={task.w:g}"
                advance(done, f"{words}: FD {result.fd:.3f}")
            else:
                advance(done, "")
    return results


class Reference:
    """The training data in feature space, and what samples are measured by against it."""

    def __init__(self, source: Source, extractor: Extractor) -> None:
        self._extractor = extractor
        self._features, _ = extractor(source.arrays(MAX_REFERENCE)[0])
        self._statistics = FeatureStatistics.from_features(self._features)
        self._manifold = Manifold.from_features(self._features)

    def measure(
        self,
        samples: np.ndarray,
        labels: np.ndarray,
        *,
        stage: str,
        seed: int,
        sampler: str | None = None,
        num_steps: int | None = None,
        w: float | None = None,
        seconds: float | None = None,
        network_calls: int | None = None,
    ) -> Result:
        """The row of samples [n, ...] that should be of classes `labels` [n]."""
        features, predicted = self._extractor(samples)
        nearness = precision_recall(self._manifold, Manifold.from_features(features))
        statistics = FeatureStatistics.from_features(features)
        return Result(
            stage=stage,
            sampler=sampler,
            num_steps=num_steps,
            w=w,
            fd=frechet_distance(self._statistics, statistics),
            kid=kernel_distance(self._features, features),
            precision=nearness.precision,
            recall=nearness.recall,
            accuracy=float(np.mean(predicted == labels)),
            n=len(samples),
            seed=seed,
            seconds=seconds,
            network_calls=network_calls,
            extractor=self._extractor.name,
        )


def _tasks(stages: list[Stage], settings: Evaluation, guidance_steps: int) -> Iterator[Task]:
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
            grids = [("ddim", guidance_steps)]
        else:
            grids = [(str(stage.sampler), int(stage.num_steps or 0))]
        for sampler, num_steps in grids:
            for w in settings.weights:
                yield Task(stage, sampler, num_steps, w)


def _timed_samples(
    trained: Trained, task: Task, labels: np.ndarray, settings: Evaluation
) -> tuple[np.ndarray, float]:
    """The task's samples, and the seconds they took once compiled."""

    def draw(labels: np.ndarray, num_steps: int) -> np.ndarray:
        return sample(
            trained,
            labels=labels,
            w=task.w,
            num_steps=num_steps,
            sampler=task.sampler,
            seed=settings.seed,
            batch_size=settings.batch_size,
            allow_untrained=True,
        )

    draw(labels[:1], 1)
    start = time.perf_counter()
    samples = draw(labels, task.num_steps)
    return samples, time.perf_counter() - start


def _keep(path: epath.Path, samples: np.ndarray, labels: np.ndarray) -> None:
    """Save the first few samples for pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez_compressed(file, image=samples[:KEPT_SAMPLES], label=labels[:KEPT_SAMPLES])
