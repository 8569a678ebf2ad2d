"""`results.csv`: a row for each (stage, sampler, num_steps, w) that was measured.

Rows of several extractors, numbers of samples and seeds live beside each other.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from etils import epath

from guided_distill.config import STAGES
from guided_distill.errors import UserError
from guided_distill.storage import first_line, write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = TypeVar("Row", bound="DataclassInstance")


@dataclass(frozen=True)
class Result:
    """A row. Fields that don't apply (the real data has no sampler) are None and written empty.

    fd: Fréchet distance of features to the training data; kid: kernel distance (unbiased, may be below
    0), kid_std: its deviation over subsets; accuracy: share of samples that the classifier gives their
    label; n: samples; seconds: wall clock of drawing all n in batches, compilation apart; network_calls:
    calls for one sample; extractor: the feature space, with @FILE where statistics of other data took
    the training data's place; alignment, caption_recall: how well samples show their captions, cosine
    and recall at 10 of `alignment.py`, or of `clip.py`, where the cosine is the CLIP score; checkpoint:
    the stage's (`checkpoint_id`); against: a fingerprint of the extractor's weights and the reference.
    Earlier versions wrote neither of the last two, nor kid_std.
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
        """What was measured: of two rows with one key, the newer replaces the older."""
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
        """Whether the row is of these, as far as it says."""
        return self.checkpoint in (None, checkpoint) and self.against in (None, against)

    @property
    def seconds_per_sample(self) -> float | None:
        """Of drawing it in a batch of many; a sample alone takes longer."""
        return None if self.seconds is None else self.seconds / self.n

    @property
    def file_stem(self) -> str:
        """The name of files about it, whatever its n, seed and extractor."""
        return file_stem(self.stage, self.sampler, self.num_steps, self.w)


def file_stem(stage: str, sampler: str | None, num_steps: int | None, w: float | None) -> str:
    """The name of a row's files in the run's folder."""
    parts = (stage, sampler, num_steps, None if w is None else f"w{w:g}")
    return "_".join(str(part) for part in parts if part is not None)


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
    """The rows of one extractor, one reference and one number of samples: distances fall with it.

    extractor: the config's; if it has no rows, the one that measured last stands in. The extractor's
    weights and the reference are the last row's. Of the numbers, the
    one that most things were measured on, the larger of two; real images stay, whatever their number.
    """
    names = [each.extractor for each in results]
    own = [name for name in names if family(name) == family(extractor)]
    chosen = [each for each in results if each.extractor in (own or names)[-1:]]
    against = [each.against for each in chosen if each.against][-1:]
    chosen = [each for each in chosen if each.against in (None, *against)]
    counts = Counter(each.n for each in chosen if each.stage != "real")
    n = max(counts, key=lambda n: (counts[n], n), default=None)
    return [each for each in chosen if each.stage == "real" or each.n == n]


def shared_weights(results: Sequence[Result]) -> set[float]:
    """Those w that everything was measured at: means over others don't compare."""
    measured: dict[tuple[str, str | None, int | None], set[float]] = {}
    for each in results:
        if each.w is not None:
            measured.setdefault((each.stage, each.sampler, each.num_steps), set()).add(each.w)
    return set.intersection(*measured.values()) if measured else set()


def at_weights(results: Sequence[Result], weights: Collection[float]) -> list[Result]:
    """The rows at one of these w, and those without; all of them, if there are no such w."""
    return [each for each in results if not weights or each.w is None or each.w in weights]


COLUMNS = tuple(field.name for field in fields(Result))


def write_results(path: epath.Path, results: Sequence[Result]) -> None:
    """Write all rows, whole or not at all."""
    write_rows(path, Result, results)


def add_result(path: epath.Path, result: Result) -> None:
    """Write a row to the file, in place of an older one of its key, beside rows that others added."""
    others = [each for each in read_results(path) if each.key != result.key]
    write_results(path, [*others, result])


def read_results(path: epath.Path) -> list[Result]:
    """The rows of a results.csv; none where there is no file.

    Raises UserError for a file that isn't whole, or a row of a stage that there is none of.
    """
    results = read_rows(path, Result)
    for result in results:
        if result.stage not in ("real", *STAGES):
            raise UserError(
                f"{path} is damaged (a row's stage is {result.stage[:50]!r}): mend or remove it, and "
                f"measure again"
            )
    return results


def write_rows(path: epath.Path, kind: type[Row], rows: Sequence[Row]) -> None:
    """Write a csv file of dataclass instances, a column a field, whole or not at all."""
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
    """What `write_rows` wrote; nothing where there is no file. A column that isn't there is None.

    Raises UserError for a file that isn't whole.
    """
    if not path.exists():
        return []
    try:
        lines = csv.reader(io.StringIO(path.read_bytes().decode()), strict=True)
        names = next(lines)
        return [_row(kind, dict(zip(names, line, strict=True))) for line in lines if line]
    except (ValueError, StopIteration, csv.Error) as error:
        raise UserError(
            f"{path} is damaged ({first_line(error)}): mend or remove it, and measure again"
        ) from error


def _row(kind: type[Row], texts: Mapping[str, str]) -> Row:
    values: dict[str, Any] = {}
    for field in fields(kind):
        values[field.name] = _parse(str(field.type), texts.get(field.name, ""))
        if values[field.name] is None and "None" not in str(field.type):
            raise ValueError(f"a row has no {field.name}")
    return kind(**values)


def _parse(kind: str, text: str) -> Any:
    if not text:
        return None
    if "int" in kind:
        return int(text)
    return float(text) if "float" in kind else text
