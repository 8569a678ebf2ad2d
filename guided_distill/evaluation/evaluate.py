"""Measure every student of a run, and its teacher at many steps, against the training data."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from etils import epath

from guided_distill.config import Evaluation
from guided_distill.data.source import Source
from guided_distill.evaluation.conditions import Subjects, captions_of, open_pixels, subjects
from guided_distill.evaluation.events import forget, log_rows
from guided_distill.evaluation.extractors.clip import ClipExtractor, clip_scores
from guided_distill.evaluation.extractors.extractor import Extractor
from guided_distill.evaluation.extractors.registry import load_extractor
from guided_distill.evaluation.measures import caveats, measure, shortages
from guided_distill.evaluation.metrics.alignment import Align, fit_alignment
from guided_distill.evaluation.outputs import Outputs, RowOutputs
from guided_distill.evaluation.reference import (
    MAX_EXAMPLES,
    Reference,
    read_reference,
    training_reference,
)
from guided_distill.evaluation.results import (
    Result,
    add_result,
    family,
    metric_name,
    read_results,
)
from guided_distill.evaluation.round_trip import evaluate_round_trips
from guided_distill.evaluation.tasks import Row, Selection, Task, effective_settings, tasks_of
from guided_distill.evaluation.trajectories import draw_path, has_path
from guided_distill.formats.companions import COMPANIONS
from guided_distill.runs.folder import read_config
from guided_distill.runs.trained import Trained, load_finished
from guided_distill.sampling.latents import load_latent_space
from guided_distill.sampling.request import Request
from guided_distill.sampling.sample import sample_batches
from guided_distill.storage import write_bytes
from guided_distill.text.encoder import SentenceEncoder
from guided_distill.text.registry import load_text_encoder
from guided_distill.training.checkpoints import checkpoint_id
from guided_distill.training.processes import is_first
from guided_distill.training.progress import console, progress


def evaluate(workdir: epath.Path, selection: Selection | None = None) -> list[Result]:
    """Write `results.csv` and `round_trip.csv`, row by row, TensorBoard's events, and samples.

    Rows that are there already are kept, unless their stage was trained anew since, or the extractor or
    the reference differs, or selection.again; a row of results.csv that was cut goes on where it was. Of
    many processes, all sample, and each looks at its share of the samples.

    Raises UserError if the folder holds no run or an unfinished one, or for what the selection names.
    """
    selection = selection or Selection()
    experiment = read_config(workdir)
    settings = effective_settings(experiment, selection)
    tasks = tasks_of(experiment, settings, selection, workdir)
    train, test, of_texts = open_pixels(experiment)
    for line in shortages(train=train.size, test=test.size):
        console.print(line, highlight=False, markup=False)
    extractor = load_extractor(settings.extractor, train, workdir)
    if selection.reference is None:
        reference = training_reference(train, extractor, workdir / "reference")
    else:
        reference = read_reference(selection.reference, train, extractor)
    for line in caveats(settings.num_samples, extractor.width, reference):
        console.print(line, highlight=False, markup=False)

    encoder = align = None
    if of_texts:
        encoder = load_text_encoder(f"companions:{workdir / COMPANIONS}")
        if isinstance(extractor, ClipExtractor):
            align = clip_scores(captions_of(test).tolist(), extractor)
        elif isinstance(encoder, SentenceEncoder) and family(extractor.name) == "lite0":
            align = fit_alignment(train, test, extractor, encoder)
    table = Table(workdir, extractor, reference, settings.seed, align)
    real, count = Row("real", None, None, None), min(test.size, MAX_EXAMPLES)
    if count > 1 and (selection.again or not table.holds(real, count)):
        captions = test.captions if count == test.size else None
        table.add(real, _real_outputs(test, extractor), count, captions)
    wanted = subjects(test, settings.num_samples, encoder)
    labels = wanted.labels
    latent = experiment.autoencoder.steps > 0 or experiment.data.name.startswith("encoded:")
    to_pixels = load_latent_space(workdir).to_images if latent else lambda samples: samples
    load = functools.lru_cache(maxsize=1)(load_finished)
    log_rows(workdir, table.results)
    with progress("evaluation", total=len(tasks), unit="rows") as advance:
        for done, task in enumerate(tasks, start=1):
            words = ""
            directory = workdir / task.stage.name
            path = workdir / "samples" / f"{task.file_stem}_path.npz"
            checkpoint = checkpoint_id(directory)
            to_measure = selection.again or not table.holds(task.row, len(labels), checkpoint)
            if has_path(task, settings) and (to_measure or not path.exists()):
                drawn = draw_path(load(directory), task, wanted, settings, to_pixels)
                write_bytes(path, drawn)
            if to_measure:
                outputs = RowOutputs(
                    _drawing(load(directory), task, wanted, settings, to_pixels),
                    labels,
                    extractor,
                    parts=table.parts(task, len(labels), checkpoint),
                    pictures=workdir / "samples" / f"{task.file_stem}.npz",
                )
                result = table.add(
                    task.row,
                    outputs,
                    len(labels),
                    wanted.captions,
                    network_calls=task.network_calls,
                    checkpoint=checkpoint,
                )
                outputs.remove_parts()
                log_rows(workdir, table.results)
                words = (
                    f"{task.stage.name} {task.sampler} N={task.num_steps} w={task.w:g}: "
                    f"{metric_name('fd', result.extractor)} {result.fd:.3f} of n={result.n}"
                )
            advance(done, words)
    if not latent:
        evaluate_round_trips(workdir, settings, selection.stages, again=selection.again)
    return table.results


class Table:
    """`results.csv`, while rows of one extractor, reference and seed are added."""

    def __init__(
        self,
        workdir: epath.Path,
        extractor: Extractor,
        reference: Reference,
        seed: int,
        align: Align | None,
    ) -> None:
        self.results = read_results(workdir / "results.csv")
        self._workdir = workdir
        self._extractor = extractor
        self._reference = reference
        self._seed = seed
        self._align = align
        self._name = f"{extractor.name}@{reference.of}" if reference.of else extractor.name

    def holds(self, row: Row, count: int, checkpoint: str | None = None) -> bool:
        """Whether the row was measured on `count` samples of the checkpoint."""
        key, against = (*row, count, self._seed, self._name), self._reference.fingerprint
        return any(
            result.key == key and result.made_of(checkpoint, against) for result in self.results
        )

    def parts(self, task: Task, count: int, checkpoint: str) -> epath.Path:
        """The folder for what the extractor says of these samples, and of no others."""
        of = (*task.row, count, self._seed, self._name, checkpoint, self._reference.fingerprint)
        name = f"{task.file_stem}_{hashlib.sha256(repr(of).encode()).hexdigest()[:8]}"
        return self._workdir / "evaluation" / self._extractor.name / name

    def add(
        self,
        row: Row,
        outputs: Iterable[Outputs],
        count: int,
        captions: np.ndarray | None,
        network_calls: int | None = None,
        checkpoint: str | None = None,
    ) -> Result:
        """Measure a row and write it. captions: what the samples show, where they are of texts."""
        align = None
        if self._align is not None and captions is not None:
            align = functools.partial(self._align, captions=captions)
        measures = measure(
            outputs,
            count=count,
            extractor=self._extractor,
            reference=self._reference,
            align=align,
        )
        result = Result(
            **row._asdict(),
            **dataclasses.asdict(measures),
            seed=self._seed,
            seconds=outputs.seconds if isinstance(outputs, RowOutputs) else None,
            network_calls=network_calls,
            extractor=self._name,
            checkpoint=checkpoint,
            against=self._reference.fingerprint,
        )
        self.results = [each for each in self.results if each.key != result.key] + [result]
        if is_first():
            add_result(self._workdir / "results.csv", result)
            forget(self._workdir, result)
        return result


def _real_outputs(source: Source, extractor: Extractor) -> Iterator[Outputs]:
    for examples in source.chunks(MAX_EXAMPLES):
        yield Outputs(*extractor(examples["image"]), examples["label"])


def _drawing(
    trained: Trained,
    task: Task,
    wanted: Subjects,
    settings: Evaluation,
    to_pixels: Callable[[np.ndarray], np.ndarray],
) -> Callable[[int], Iterator[np.ndarray]]:
    """f(start): the task's samples from that index on, by a sampler that is compiled by then."""
    request = Request(
        condition=wanted.condition,
        null=wanted.null,
        w=task.w,
        num_steps=task.num_steps,
        sampler=task.sampler,
        seed=settings.seed,
        batch_size=settings.batch_size,
        allow_untrained=True,
    )

    def draw_from(start: int) -> Iterator[np.ndarray]:
        one = {name: each[:1] for name, each in wanted.condition.items()}
        first = dataclasses.replace(request, condition=one, num_steps=1)
        to_pixels(next(sample_batches(trained, first)))
        return map(to_pixels, sample_batches(trained, dataclasses.replace(request, start=start)))

    return draw_from
