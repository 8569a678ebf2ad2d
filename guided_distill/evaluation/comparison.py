"""Names of the measures in `results.csv`, and which of its rows are comparable."""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import fields

from guided_distill.evaluation.metrics.registry import METRICS
from guided_distill.evaluation.results import Result

_TITLES = {
    column.name: column.metadata.get("title", column.name)
    for metric in METRICS
    for column in fields(metric)
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
    """The kind of an extractor, from its name in `results.csv` or a config: "lite0" for "lite0-64"."""
    return re.split("[-:@]", extractor)[0].replace("coordinates", "classifier")


def metric_name(column: str, extractor: str) -> str:
    """The usual name of a column's measure when it was computed with this extractor."""
    return (_TITLES | _FAMILIES.get(family(extractor), {}))[column]


def comparable(results: Sequence[Result], extractor: str) -> list[Result]:
    """The rows with the same extractor, reference and number of samples, whose distances are comparable.

    extractor: the config's; if it has no rows, the extractor of the last row is used. The weights and
    the reference are those of the extractor's last row. The number of samples is that of most rows or, in
    a tie, the larger one. Rows of real images are kept, whatever their number of samples.
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
    """The w at which every (stage, sampler, num_steps) was measured: means over them are comparable."""
    measured: dict[tuple[str, str | None, int | None], set[float]] = {}
    for each in results:
        if each.w is not None:
            measured.setdefault((each.stage, each.sampler, each.num_steps), set()).add(each.w)
    return set.intersection(*measured.values()) if measured else set()


def at_weights(results: Sequence[Result], weights: Collection[float]) -> list[Result]:
    """The rows at one of these weights, and those without w; all rows if no weights are given."""
    return [each for each in results if not weights or each.w is None or each.w in weights]
