"""The teacher's samples that a student's are compared with, drawn once for each w and kept in a file."""

import dataclasses
import functools
import hashlib
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from guided_distill.config import Experiment
from guided_distill.errors import UserError
from guided_distill.evaluation.drawing import Drawing
from guided_distill.evaluation.outputs import row_outputs
from guided_distill.evaluation.tasks import Row
from guided_distill.places import path_named
from guided_distill.runs.trained import Trained, load_finished, read_finished
from guided_distill.storage import npz_bytes, read_npz, write_bytes
from guided_distill.training.processes import is_first
from guided_distill.training.record import checkpoint_id

if TYPE_CHECKING:
    from guided_distill.evaluation.measures import Yardstick

MOST_PAIRS = 1024
MOST_BYTES = 2**26
"""Samples of the same noise are kept up to this number, and up to this size as float32."""

_SEEDS = 2**64


@dataclasses.dataclass(frozen=True, eq=False)
class TeacherSamples:
    """features [n, D]: of samples of other seeds. samples [k, ...]: of the noise of the rows' first k."""

    features: np.ndarray
    samples: np.ndarray


class Comparison:
    """The teacher at a number of DDIM steps, as the reference of students.

    Raises UserError if neither the run nor its config.start_from holds a finished teacher.
    """

    def __init__(self, workdir: epath.Path, experiment: Experiment, num_steps: int) -> None:
        self._teacher = _teacher_of(workdir, experiment)
        self._workdir = workdir
        self._num_steps = num_steps

    @property
    def id(self) -> str:
        """What identifies the teacher and its steps, such as "0123abcd@256"."""
        return f"{checkpoint_id(self._teacher)}@{self._num_steps}"

    def samples(self, w: float, drawing: Drawing, yardstick: "Yardstick") -> TeacherSamples:
        """The teacher's samples at this w, read from their file, or drawn and saved; resumes."""
        settings, count = drawing.settings, len(drawing.subjects.labels)
        extractor, against = yardstick.extractor, yardstick.reference.fingerprint
        drawn_as = (self.id, w, settings.seed, count, extractor.name, against)
        name = hashlib.sha256(repr(drawn_as).encode()).hexdigest()[:8]
        file = self._workdir / "reference" / f"{extractor.name}_teacher_w{w:g}_{name}.npz"
        parts = self._workdir / "evaluation" / extractor.name / file.stem
        try:
            return TeacherSamples(**read_npz(file))
        except (UserError, TypeError):  # It is missing, or damaged: draw the samples again.
            pass
        row = Row("teacher", "ddim", self._num_steps, w)
        trained = self._loaded
        others = dataclasses.replace(
            drawing,
            settings=dataclasses.replace(settings, seed=(settings.seed + _SEEDS // 2) % _SEEDS),
        )
        outputs = row_outputs(
            functools.partial(others.draw, trained, row),
            drawing.subjects.labels,
            extractor,
            parts=parts,
        )
        found = TeacherSamples(
            features=np.concatenate([each.features for each in outputs]),
            samples=_first_samples(drawing, trained, row),
        )
        write_bytes(file, npz_bytes(**dataclasses.asdict(found)))
        if is_first() and parts.exists():
            parts.rmtree()
        return found

    @functools.cached_property
    def _loaded(self) -> Trained:
        return load_finished(self._teacher)


def _first_samples(drawing: Drawing, trained: Trained, row: Row) -> np.ndarray:
    found: list[np.ndarray] = []
    for batch in drawing.draw(trained, row, 0):
        found.append(batch)
        wanted = max(1, min(MOST_PAIRS, MOST_BYTES // batch[0].size // 4))
        if sum(map(len, found)) >= wanted:
            break
    return np.concatenate(found)[:wanted].astype(np.float32)


def _teacher_of(workdir: epath.Path, experiment: Experiment) -> epath.Path:
    places = [workdir / "teacher"]
    if experiment.start_from:
        places.append(path_named(experiment.start_from))
    for place in places:
        if place.exists() and read_finished(place).stage == "teacher":
            return place
    raise UserError(
        f"--against_teacher needs the teacher, but {workdir} has none, and its config.start_from names "
        f"none: leave the flag out, and config.evaluation.against_teacher"
    )
