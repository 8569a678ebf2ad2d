"""`results.csv`: a row for each (stage, sampler, num_steps, w) that was measured.

Rows of several extractors, numbers of samples and seeds live beside each other.
"""

import csv
import io
import re
from collections import Counter
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

    fd: Fréchet distance of features to the training data; kid: kernel distance (unbiased, may be below
    0); accuracy: share of samples that the classifier gives their label; n: samples; seconds: sampling
    time, compilation apart; network_calls: calls for one sample; extractor: the feature space, with
    @FILE where statistics of other data took the training data's place; alignment, caption_recall: how
    well samples show their captions, cosine and recall at 10 of `alignment.py`, or of `clip.py`, where
    the cosine is the CLIP score.
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


_NAMES = {
    "fd": "Fréchet distance",
    "kid": "kernel distance",
    "inception_score": "class score",
    "accuracy": "class accuracy",
    "alignment": "alignment",
}
_FAMILIES = {
    "lite0": {
        "fd": "FD-Lite0",
        "kid": "KID-Lite0",
        "inception_score": "IS-Lite0",
        "alignment": "MiniLM-Lite0 alignment",
    },
    "inception": {"fd": "FID", "kid": "KID", "inception_score": "Inception Score"},
    "clip": {"fd": "FD-CLIP", "kid": "KID-CLIP", "alignment": "CLIP score"},
}


def family(extractor: str) -> str:
    """The kind of an extractor, of a name in `results.csv` or in a config: "lite0" of "lite0-64"."""
    return re.split("[-:@]", extractor)[0].replace("coordinates", "classifier")


def metric_name(column: str, extractor: str) -> str:
    """What people call the measure of a column that was made with this extractor."""
    return (_NAMES | _FAMILIES.get(family(extractor), {}))[column]


def comparable(results: Sequence[Result], extractor: str) -> list[Result]:
    """The rows of one extractor and one number of samples: distances fall with it.

    extractor: the config's; if it has no rows, the one that measured last stands in. Of the numbers, the
    one that most things were measured on, the larger of two; real images stay, whatever their number.
    """
    names = [each.extractor for each in results]
    own = [name for name in names if family(name) == family(extractor)]
    chosen = [each for each in results if each.extractor in (own or names)[-1:]]
    counts = Counter(each.n for each in chosen if each.stage != "real")
    n = max(counts, key=lambda n: (counts[n], n), default=None)
    return [each for each in chosen if each.stage == "real" or each.n == n]


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
