"""Measure every stage of a run against the training data, the teacher at several numbers of steps."""

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple

import numpy as np
from etils import epath

from guided_distill.config import Evaluation, Experiment
from guided_distill.data.source import Source
from guided_distill.diffusion.samplers import SAMPLERS
from guided_distill.evaluation.captions import caption_alignment
from guided_distill.evaluation.comparison import metric_name
from guided_distill.evaluation.drawing import Drawing, subjects
from guided_distill.evaluation.events import forget, log_rows
from guided_distill.evaluation.extractors.extractor import Extractor
from guided_distill.evaluation.extractors.registry import load_extractor
from guided_distill.evaluation.measures import Yardstick, caveats, measure, shortages
from guided_distill.evaluation.metrics.registry import Measures
from guided_distill.evaluation.outputs import Outputs, row_outputs
from guided_distill.evaluation.reference import (
    MAX_EXAMPLES,
    open_pixels,
    read_reference,
    training_reference,
)
from guided_distill.evaluation.results import Result, Row, add_result, read_results
from guided_distill.evaluation.round_trip import evaluate_round_trips
from guided_distill.evaluation.tasks import Selection, Task, effective_settings, tasks_of
from guided_distill.evaluation.teacher import Comparison
from guided_distill.formats.companions import COMPANIONS
from guided_distill.runs.folder import read_config
from guided_distill.runs.trained import Trained, load_finished
from guided_distill.sampling.latents import load_latent_space
from guided_distill.storage import write_bytes
from guided_distill.text.encoder import TextEncoder
from guided_distill.text.registry import load_text_encoder
from guided_distill.training.processes import is_first
from guided_distill.training.progress import console, progress
from guided_distill.training.record import checkpoint_id

REAL = Row("real", None, None, None)


def evaluate(workdir: epath.Path, selection: Selection | None = None) -> list[Result]:
    """Write `results.csv` and `round_trip.csv` row by row, TensorBoard events, and samples.

    A row in the file is kept unless its stage was retrained since, the extractor or the reference
    differs, or `selection.again` is set; an interrupted row of results.csv resumes. With several
    processes, all sample, and each extracts the features of its share of the samples.

    Raises UserError if the folder holds no run or an unfinished one, or if the selection is invalid.
    """
    selection = selection or Selection()
    experiment = read_config(workdir)
    settings = effective_settings(experiment, selection)
    tasks = tasks_of(experiment, settings, selection, workdir)
    train, test, of_texts = open_pixels(experiment)
    encoder = load_text_encoder(f"companions:{workdir / COMPANIONS}") if of_texts else None
    _print(shortages(train=train.size, test=test.size))
    yardstick = _yardstick(workdir, settings, selection.reference, (train, test), encoder)
    _print(caveats(settings.num_samples, yardstick))
    compared = settings.against_teacher
    comparison = None if compared is None else Comparison(workdir, experiment, compared)
    table = Table(workdir, yardstick, settings.seed, comparison, again=selection.again)
    _measure_real_images(test, table)

    drawing = Drawing(
        subjects(test, settings.num_samples, encoder), settings, _decoder(workdir, experiment)
    )
    load = functools.lru_cache(maxsize=1)(load_finished)
    log_rows(workdir, table.results)
    with progress("evaluation", total=len(tasks), unit="rows") as advance:
        for done, task in enumerate(tasks, start=1):
            advance(done, _measure_task(task, drawing, table, load))
    if not _is_latent(experiment):
        evaluate_round_trips(workdir, settings, selection.stages, again=selection.again)
    return table.results


class Table:
    """`results.csv`, to which rows with one yardstick and one seed are added.

    comparison: the teacher that samples are also compared with. again: whether to measure again the rows
    that the file already holds.
    """

    def __init__(
        self,
        workdir: epath.Path,
        yardstick: Yardstick,
        seed: int,
        comparison: Comparison | None = None,
        *,
        again: bool = False,
    ) -> None:
        self.workdir = workdir
        self.yardstick = yardstick
        self.comparison = comparison
        self.results = read_results(workdir / "results.csv")
        self._seed = seed
        self._again = again

    def lacks(self, row: Row, count: int, checkpoint: str | None = None) -> bool:
        """Whether the row still has to be measured on `count` samples of the checkpoint."""
        key = (row, count, self._seed, self.yardstick.name)
        against, teacher = self.yardstick.reference.fingerprint, self._teacher(row)
        return self._again or not any(
            each.key == key and each.made_of(checkpoint, against, teacher) for each in self.results
        )

    def _teacher(self, row: Row) -> str | None:
        return self.comparison.id if self.comparison and row != REAL else None

    def parts(self, task: Task, count: int, checkpoint: str) -> epath.Path:
        """The folder of the extractor's outputs for exactly these samples."""
        yardstick = self.yardstick
        against = yardstick.reference.fingerprint
        made_of = (*astuple(task.row), count, self._seed, yardstick.name, checkpoint, against)
        made_of += (self._teacher(task.row),)
        name = f"{task.row.file_stem}_{hashlib.sha256(repr(made_of).encode()).hexdigest()[:8]}"
        return self.workdir / "evaluation" / yardstick.extractor.name / name

    def add(
        self,
        row: Row,
        measures: Measures,
        *,
        network_calls: int | None = None,
        checkpoint: str | None = None,
    ) -> Result:
        """Write a measured row. With several processes, process 0 writes it."""
        result = Result(
            **asdict(row),
            **asdict(measures),
            seed=self._seed,
            network_calls=network_calls,
            extractor=self.yardstick.name,
            checkpoint=checkpoint,
            against=self.yardstick.reference.fingerprint,
            teacher=self._teacher(row),
        )
        self.results = [each for each in self.results if each.key != result.key] + [result]
        if is_first():
            add_result(self.workdir / "results.csv", result)
            forget(self.workdir, result)
        return result


def _measure_task(
    task: Task, drawing: Drawing, table: Table, load: Callable[[epath.Path], Trained]
) -> str:
    """Measure a task's samples unless the table holds its row; return a few words on the result."""
    workdir, subjects = table.workdir, drawing.subjects
    folder, count = workdir / task.stage.name, len(subjects.labels)
    checkpoint = checkpoint_id(folder)
    lacking = table.lacks(task.row, count, checkpoint)
    path = workdir / "samples" / f"{task.row.file_stem}_path.npz"
    if drawing.has_path(task) and (lacking or not path.exists()):
        write_bytes(path, drawing.path(load(folder), task.row))
    if not lacking:
        return ""
    parts, extractor = table.parts(task, count, checkpoint), table.yardstick.extractor
    comparison = table.comparison
    teacher = comparison.samples(task.w, drawing, table.yardstick) if comparison else None
    outputs = row_outputs(
        functools.partial(drawing.draw, load(folder), task.row),
        subjects.labels,
        extractor,
        parts=parts,
        pictures=workdir / "samples" / f"{task.row.file_stem}.npz",
        teacher=teacher.samples if teacher and SAMPLERS[task.sampler].deterministic else None,
    )
    result = table.add(
        task.row,
        measure(outputs, table.yardstick, count=count, captions=subjects.captions, teacher=teacher),
        network_calls=task.network_calls,
        checkpoint=checkpoint,
    )
    if is_first() and parts.exists():
        parts.rmtree()
    log_rows(workdir, table.results)
    return (
        f"{task.stage.name} {task.sampler} N={task.num_steps} w={task.w:g}: "
        f"{metric_name('fd', result.extractor)} {result.fd:.3f}, n={result.n}"
    )


def _measure_real_images(test: Source, table: Table) -> None:
    """Measure the test split unless the table holds its row or it has fewer than two images."""
    count = min(test.size, MAX_EXAMPLES)
    if count < 2 or not table.lacks(REAL, count):
        return
    captions = test.captions if count == test.size else None
    outputs = _real_outputs(test, table.yardstick.extractor)
    table.add(REAL, measure(outputs, table.yardstick, count=count, captions=captions))


def _real_outputs(source: Source, extractor: Extractor) -> Iterator[Outputs]:
    for examples in source.chunks(MAX_EXAMPLES):
        yield Outputs(*extractor(examples["image"]), examples["label"])


def _yardstick(
    workdir: epath.Path,
    settings: Evaluation,
    reference: epath.Path | None,
    splits: tuple[Source, Source],
    encoder: TextEncoder | None,
) -> Yardstick:
    """The extractor of the settings, and the reference from a file or the training split."""
    train, test = splits
    extractor = load_extractor(settings.extractor, train, workdir)
    return Yardstick(
        extractor,
        training_reference(train, extractor, workdir / "reference")
        if reference is None
        else read_reference(reference, train, extractor),
        caption_alignment(train, test, extractor, encoder) if encoder else None,
    )


def _is_latent(experiment: Experiment) -> bool:
    return experiment.autoencoder.steps > 0 or experiment.data.name.startswith("encoded:")


def _decoder(workdir: epath.Path, experiment: Experiment) -> Callable[[np.ndarray], np.ndarray]:
    """The function that maps the output of the run's samplers to pixels."""
    if _is_latent(experiment):
        return load_latent_space(workdir).to_images
    return lambda samples: samples


def _print(lines: list[str]) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False)
