"""`results.csv`: a row for each (stage, sampler, num_steps, w) that was measured.

A file can hold rows of several extractors, numbers of samples, and seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from etils import epath

from guided_distill.config import STAGES
from guided_distill.errors import UserError
from guided_distill.evaluation.metrics.registry import Measures
from guided_distill.evaluation.tables import read_rows, write_rows


@dataclass(frozen=True)
class Row:
    """The first columns of a row, which say what was measured.

    Fields that don't apply (real images have no sampler) are None, and written empty.
    """

    stage: str
    sampler: str | None
    num_steps: int | None
    w: float | None

    @property
    def file_stem(self) -> str:
        """The stem of the names of the row's files in the run's folder."""
        w = None if self.w is None else f"w{self.w:g}"
        parts = (self.stage, self.sampler, self.num_steps, w)
        return "_".join(str(part) for part in parts if part is not None)


@dataclass(frozen=True, kw_only=True)
class Result(Measures, Row):
    """A row of the file: what was measured, its measures, and how it was measured.

    network_calls: calls of the network for one sample. extractor: the feature space, with @FILE if the
    reference is a file instead of the training data. checkpoint: `checkpoint_id` of the stage. against:
    fingerprint of the extractor's weights and of the reference. teacher: the teacher's checkpoint and
    steps behind fd_teacher, kid_teacher and rmse_teacher, as in "0123abcd@256". Columns that an earlier
    version didn't write are None.
    """

    seed: int
    network_calls: int | None
    extractor: str
    checkpoint: str | None = None
    against: str | None = None
    teacher: str | None = None

    @property
    def row(self) -> Row:
        """What was measured."""
        return Row(self.stage, self.sampler, self.num_steps, self.w)

    @property
    def key(self) -> tuple[Row, int, int, str]:
        """What identifies the row: a new row replaces an older one with the same key."""
        return self.row, self.n, self.seed, self.extractor

    def made_of(self, checkpoint: str | None, against: str, teacher: str | None = None) -> bool:
        """Whether the row is of this checkpoint, reference and teacher.

        A checkpoint or reference that the row lacks matches any, as does a teacher that isn't asked for.
        """
        return (
            self.checkpoint in (None, checkpoint)
            and self.against in (None, against)
            and teacher in (None, self.teacher)
        )

    @property
    def seconds_per_sample(self) -> float | None:
        """Seconds for one sample within a batch; a sample drawn alone takes longer."""
        return None if self.seconds is None else self.seconds / self.n


COLUMNS = tuple(field.name for field in fields(Result))


def write_results(path: epath.Path, results: Sequence[Result]) -> None:
    """Write all rows atomically."""
    write_rows(path, Result, results)


def add_result(path: epath.Path, result: Result) -> None:
    """Add a row to the file. It replaces an older row with its key; rows of other processes stay."""
    others = [each for each in read_results(path) if each.key != result.key]
    write_results(path, [*others, result])


def read_results(path: epath.Path) -> list[Result]:
    """The rows of a results.csv; none if there is no file.

    Raises UserError for a damaged file, or a row with an unknown stage.
    """
    results = read_rows(path, Result)
    for result in results:
        if result.stage not in ("real", *STAGES):
            raise UserError(
                f"{path} is damaged (a row's stage is {result.stage[:50]!r}): repair or remove it, and "
                f"evaluate again"
            )
    return results
