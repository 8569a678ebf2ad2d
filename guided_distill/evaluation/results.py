"""`results.csv`: one row for each (stage, sampler, num_steps, w) that was measured."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from etils import epath

from guided_distill.training.checkpoints import write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = TypeVar("Row", bound="DataclassInstance")


@dataclass(frozen=True)
class Result:
    """A row. Fields that don't apply (the real data has no sampler) are None and written empty.

    fd: Frechet distance of features to the training data; kid: kernel distance (unbiased, may be below
    0); accuracy: share of samples that the classifier gives their label; n: samples; seconds: sampling
    time, compilation apart; network_calls: calls for one sample; extractor: the feature space.
    """

    stage: str
    sampler: str | None
    num_steps: int | None
    w: float | None
    fd: float
    kid: float
    precision: float
    recall: float
    accuracy: float
    n: int
    seed: int
    seconds: float | None
    network_calls: int | None
    extractor: str

    @property
    def key(self) -> tuple[str, str | None, int | None, float | None, int, int, str]:
        """What was measured: two rows with one key measure the same thing."""
        return (
            self.stage,
            self.sampler,
            self.num_steps,
            self.w,
            self.n,
            self.seed,
            self.extractor,
        )


COLUMNS = tuple(field.name for field in fields(Result))


def write_results(path: epath.Path, results: list[Result]) -> None:
    """Write all rows, whole or not at all."""
    write_rows(path, Result, results)


def read_results(path: epath.Path) -> list[Result]:
    """The rows of a results.csv; none where there is no file."""
    return read_rows(path, Result)


def write_rows(path: epath.Path, kind: type[Row], rows: Sequence[Row]) -> None:
    """Write a csv file of dataclass instances, a column a field, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {
                name: f"{value:.6g}" if isinstance(value, float) else value
                for name, value in asdict(row).items()
            }
        )
    write_text(path, text.getvalue())


def read_rows(path: epath.Path, kind: type[Row]) -> list[Row]:
    """What `write_rows` wrote; nothing where there is no file."""
    if not path.exists():
        return []
    kinds = {field.name: str(field.type) for field in fields(kind)}
    return [
        kind(**{name: _parse(kinds[name], text) for name, text in row.items()})
        for row in csv.DictReader(io.StringIO(path.read_text()))
    ]


def _parse(kind: str, text: str) -> Any:
    if not text:
        return None
    if "int" in kind:
        return int(text)
    return float(text) if "float" in kind else text
