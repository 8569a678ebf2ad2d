"""What an extractor says of a row's samples, kept in parts so that a cut row goes on where it was."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from etils import epath

from guided_distill.errors import UserError
from guided_distill.evaluation.extractors.extractor import Extractor
from guided_distill.storage import npz_bytes, read_npz, write_bytes
from guided_distill.training.processes import is_first

SECONDS_BETWEEN_PARTS = 60.0
KEPT_SAMPLES = 64
"""How many of a row's samples are kept for pictures."""


class Outputs(NamedTuple):
    """Of some samples: features [n, D], logits [n, K], and the classes [n] that they should be of."""

    features: np.ndarray
    logits: np.ndarray
    labels: np.ndarray


class RowOutputs:
    """The outputs of one row's samples, in order, made once.

    seconds: the wall clock that drawing them took, of all parts; neither the compilation nor the
    extractor is in it, but the filling of the last batch is.
    """

    def __init__(
        self,
        draw: Callable[[int], Iterator[np.ndarray]],
        labels: np.ndarray,
        extractor: Extractor,
        *,
        parts: epath.Path,
        pictures: epath.Path,
    ) -> None:
        """draw: samples from an index on, some at a time. labels: one for each sample.

        parts: the folder where outputs are kept until `remove_parts`. pictures: the npz file for the
        first few samples.
        """
        self._draw = draw
        self._labels = labels
        self._extractor = extractor
        self._parts = parts
        self._pictures = pictures
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Outputs]:
        done = 0
        while (part := _read_part(self._parts / _name(done))) is not None:
            features, logits, seconds = part
            self.seconds += seconds
            yield self._labelled(features, logits, done)
            done += len(features)
        yield from self._compute(done)

    def remove_parts(self) -> None:
        """Forget what was kept: the row is measured. Of many processes, the first does it."""
        if is_first() and self._parts.exists():
            self._parts.rmtree()

    def _compute(self, done: int) -> Iterator[Outputs]:
        first_samples: list[np.ndarray] = []
        features: list[np.ndarray] = []
        logits: list[np.ndarray] = []
        saved, seconds, last_save = done, 0.0, time.monotonic()
        samples_left = self._draw(done)
        while True:
            start = time.perf_counter()
            samples = next(samples_left, None)
            seconds += time.perf_counter() - start
            if samples is None:
                break
            if done < KEPT_SAMPLES:
                first_samples.append(samples)
                self._save_pictures(np.concatenate(first_samples)[:KEPT_SAMPLES])
            for kept, output in zip((features, logits), self._extractor(samples), strict=True):
                kept.append(output)
            yield self._labelled(features[-1], logits[-1], done)
            done += len(samples)
            # The pictures must not be drawn again.
            if done >= KEPT_SAMPLES and time.monotonic() - last_save > SECONDS_BETWEEN_PARTS:
                self._save_part(saved, features, logits, seconds)
                self.seconds += seconds
                saved, seconds, last_save = done, 0.0, time.monotonic()
                features, logits = [], []
        self.seconds += seconds

    def _labelled(self, features: np.ndarray, logits: np.ndarray, start: int) -> Outputs:
        return Outputs(features, logits, self._labels[start : start + len(features)])

    def _save_part(
        self, start: int, features: list[np.ndarray], logits: list[np.ndarray], seconds: float
    ) -> None:
        arrays = {"features": np.concatenate(features), "logits": np.concatenate(logits)}
        write_bytes(self._parts / _name(start), npz_bytes(**arrays, seconds=np.asarray(seconds)))

    def _save_pictures(self, samples: np.ndarray) -> None:
        arrays = npz_bytes(image=samples, label=self._labels[: len(samples)])
        write_bytes(self._pictures, arrays)


def _name(start: int) -> str:
    return f"from_{start}.npz"


def _read_part(path: epath.Path) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Features, logits, seconds; None if there is no such part, or a damaged one."""
    if not path.exists():
        return None
    try:
        part = read_npz(path)
        return part["features"], part["logits"], float(part["seconds"])
    except (UserError, KeyError):
        return None
