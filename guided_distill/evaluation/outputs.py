"""An extractor's outputs for the samples of a row, saved in parts so that an interrupted row resumes."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from etils import epath

from guided_distill.errors import UserError
from guided_distill.evaluation.extractors.extractor import Extractor
from guided_distill.storage import npz_bytes, read_npz, write_bytes

SECONDS_BETWEEN_PARTS = 60.0
KEPT_SAMPLES = 64
"""The number of a row's samples that are kept for pictures."""

Draw = Callable[[int], Iterable[np.ndarray]]
"""f(start) yields a row's samples from that index on, in batches [n, ...]."""


class Outputs(NamedTuple):
    """Features [n, D] and logits [n, K] of n samples, and the labels [n] that they were drawn for.

    seconds: the wall-clock time to draw them, without compilation and without the extractor; 0 for real
    images. squared_errors: as in `Samples`; None if there is nothing to compare with.
    """

    features: np.ndarray
    logits: np.ndarray
    labels: np.ndarray
    seconds: float = 0.0
    squared_errors: np.ndarray | None = None


def row_outputs(
    draw: Draw,
    labels: np.ndarray,
    extractor: Extractor,
    *,
    parts: epath.Path,
    pictures: epath.Path | None = None,
    teacher: np.ndarray | None = None,
) -> Iterator[Outputs]:
    """Yield the outputs for all samples of a row in order: first those saved in `parts`, then new ones.

    labels: one for each sample. parts: a folder for this row only; remove it when the row is measured.
    pictures: the npz file for the first KEPT_SAMPLES samples. teacher: the teacher's samples [k, ...] of
    the same noise as the first k of the row.
    """
    done = 0
    for features, logits, seconds, errors in _saved_parts(parts):
        yield Outputs(features, logits, labels[done : done + len(features)], seconds, errors)
        done += len(features)

    first_samples: list[np.ndarray] = []
    unsaved: list[Outputs] = []
    begin, last_save = done, time.monotonic()
    for samples, seconds in _timed(draw(done)):
        if pictures and done < KEPT_SAMPLES:
            first_samples.append(samples)
            shown = np.concatenate(first_samples)[:KEPT_SAMPLES]
            write_bytes(pictures, npz_bytes(image=shown, label=labels[: len(shown)]))
        rows = slice(done, done + len(samples))
        errors = squared_errors(samples, samples[:0] if teacher is None else teacher[rows])
        unsaved.append(Outputs(*extractor(samples), labels[rows], seconds, errors))
        yield unsaved[-1]
        done += len(samples)
        # No part ends before the pictures are complete, because a resumed row couldn't complete them.
        if done >= KEPT_SAMPLES and time.monotonic() - last_save > SECONDS_BETWEEN_PARTS:
            _save_part(parts, begin, unsaved)
            unsaved, begin, last_save = [], done, time.monotonic()


def squared_errors(samples: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Mean squared differences [n] of samples [n, ...] and the teacher's [k, ...]; NaN after k."""
    errors = np.full(len(samples), np.nan)
    k = min(len(samples), len(teacher))
    differences = samples[:k].astype(np.float64) - teacher[:k]
    errors[:k] = np.square(differences).mean(axis=tuple(range(1, samples.ndim)))
    return errors


def _timed(batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, float]]:
    """Yield each batch with the seconds that it took to arrive."""
    start = time.perf_counter()
    for batch in batches:
        yield batch, time.perf_counter() - start
        start = time.perf_counter()


def _save_part(folder: epath.Path, begin: int, outputs: list[Outputs]) -> None:
    """Write the outputs for the samples from index `begin` on."""
    arrays = {
        name: np.concatenate([getattr(each, name) for each in outputs])
        for name in ("features", "logits", "squared_errors")
    }
    seconds = np.asarray(sum(each.seconds for each in outputs))
    write_bytes(_part(folder, begin), npz_bytes(**arrays, seconds=seconds))


def _saved_parts(
    folder: epath.Path,
) -> Iterator[tuple[np.ndarray, np.ndarray, float, np.ndarray]]:
    """Yield (features, logits, seconds, squared_errors) of each part, up to a missing or damaged one."""
    done = 0
    while (file := _part(folder, done)).exists():
        try:
            part = read_npz(file)
            features, logits = part["features"], part["logits"]
            seconds, errors = float(part["seconds"]), part["squared_errors"]
        except (UserError, KeyError):
            return
        yield features, logits, seconds, errors
        done += len(features)


def _part(folder: epath.Path, begin: int) -> epath.Path:
    return folder / f"from_{begin}.npz"
