"""`results.csv`: a row for each (stage, sampler, num_steps, w) that was measured.

A file can hold rows of several extractors, numbers of samples, and seeds.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from etils import epath

from guided_distill import kinds
from guided_distill.errors import UserError
from guided_distill.storage import first_line, write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = TypeVar("Row", bound="DataclassInstance")


@dataclass(frozen=True)
class Result:
    """A row. Fields that don't apply (real images have no sampler) are None, and written empty.

    fd: Fréchet distance between the features of samples and of the training data. kid: kernel distance
    (unbiased, so it may be below 0); kid_std: its standard deviation over subsets. accuracy: share of
    samples that the classifier assigns to their label. n: number of samples. seconds: wall-clock time to
    draw all n in batches, without compilation. network_calls: calls of the network for one sample.
    extractor: the feature space, with @FILE if the reference is a file instead of the training data.
    alignment, caption_recall: cosine, and recall at 10, of samples with their captions; with CLIP
    features the cosine is the CLIP score. checkpoint: `checkpoint_id` of the stage. against: fingerprint
    of the extractor's weights and of the reference. Earlier versions wrote neither of these two, nor
    kid_std.
    """

    stage: str
    sampler: str | None
    num_steps: int | None
    w: float | None
    fd: float
    kid: float | None
    precision: float | None
    recall: float | None
    accuracy: float | None
    n: int
    seed: int
    seconds: float | None
    network_calls: int | None
    extractor: str
    inception_score: float | None = None
    alignment: float | None = None
    caption_recall: float | None = None
    checkpoint: str | None = None
    against: str | None = None
    kid_std: float | None = None

    @property
    def key(self) -> tuple[str, str | None, int | None, float | None, int, int, str]:
        """What identifies the row: a new row replaces an older one with the same key."""
        return (
            self.stage,
            self.sampler,
            self.num_steps,
            self.w,
            self.n,
            self.seed,
            self.extractor,
        )

    def made_of(self, checkpoint: str | None, against: str) -> bool:
        """Whether the row is of this checkpoint and reference; a field that it lacks matches any."""
        return self.checkpoint in (None, checkpoint) and self.against in (None, against)

    @property
    def seconds_per_sample(self) -> float | None:
        """Seconds for one sample within a batch; a sample drawn alone takes longer."""
        return None if self.seconds is None else self.seconds / self.n

    @property
    def file_stem(self) -> str:
        """The stem of the names of the row's files, without n, seed and extractor."""
        return file_stem(self.stage, self.sampler, self.num_steps, self.w)


def file_stem(stage: str, sampler: str | None, num_steps: int | None, w: float | None) -> str:
    """The stem of the names of a row's files in the run's folder."""
    parts = (stage, sampler, num_steps, None if w is None else f"w{w:g}")
    return "_".join(str(part) for part in parts if part is not None)


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
    # Here, because the verb `runs` reads rows without JAX, which this imports.
    from guided_distill.config import STAGES

    results = read_rows(path, Result)
    for result in results:
        if result.stage not in ("real", *STAGES):
            raise UserError(
                f"{path} is damaged (a row's stage is {result.stage[:50]!r}): repair or remove it, and "
                f"evaluate again"
            )
    return results


def write_rows(path: epath.Path, kind: type[Row], rows: Sequence[Row]) -> None:
    """Write dataclass instances as csv, one column per field, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {
                name: repr(float(value)) if isinstance(value, float) else value
                for name, value in asdict(row).items()
            }
        )
    write_text(path, text.getvalue())


def read_rows(path: epath.Path, kind: type[Row]) -> list[Row]:
    """Read the rows that `write_rows` wrote; none if there is no file. A missing column is read as None.

    Raises UserError for a damaged file.
    """
    if not path.exists():
        return []
    try:
        lines = csv.reader(io.StringIO(path.read_bytes().decode()), strict=True)
        names = next(lines)
        return [_row(kind, dict(zip(names, line, strict=True))) for line in lines if line]
    except (ValueError, StopIteration, csv.Error) as error:
        raise UserError(
            f"{path} is damaged ({first_line(error)}): repair or remove it, and evaluate again"
        ) from error


def _row(kind: type[Row], texts: Mapping[str, str]) -> Row:
    values: dict[str, Any] = {}
    for field in fields(kind):
        text = texts.get(field.name, "")
        if not text and kinds.without_none(field.type) is field.type:
            raise ValueError(f"a row has no {field.name}")
        try:
            values[field.name] = kinds.read_number(text, field.type) if text else None
        except ValueError as error:
            raise ValueError(f"{field.name} {error}") from None
    return kind(**values)
