"""The model card of an export, its README.md, with what its run measured and drew."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from etils import epath

from guided_distill.evaluation.comparison import comparable, metric_name
from guided_distill.evaluation.results import Result, read_results
from guided_distill.objectives.stage import stage_name
from guided_distill.pictures import grid_or_plot, png
from guided_distill.runs.folder import read_config
from guided_distill.runs.model_file import is_model_file
from guided_distill.storage import read_npz, write_bytes, write_text
from guided_distill.training.record import checkpoint_id

PICTURE = "samples.png"
IMAGES, COLUMNS_OF_IMAGES = 40, 10

_MEASURES = ("fd", "kid", "inception_score", "accuracy", "alignment")


@dataclass(frozen=True)
class Evidence:
    """What a run measured of its stages, as a table of texts, and samples of one, as a PNG file.

    extractor: of the rows' features. caption: of the picture.
    """

    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    extractor: str = ""
    picture: bytes | None = None
    caption: str = ""


def evidence_of(stages: Sequence[epath.Path]) -> Evidence:
    """What the run of these stages' folders measured of them, and of the teacher at its most steps.

    Nothing for a model's file, which has no run, and for a run that wasn't evaluated. Raises UserError
    if results.csv or the samples are damaged.
    """
    if any(map(is_model_file, stages)):
        return Evidence()
    workdir = stages[-1].parent
    results = read_results(workdir / "results.csv")
    if not results:
        return Evidence()
    rows = comparable(results, read_config(workdir).evaluation.extractor)
    own = [each for each in rows if any(_is_of(each, stage) for stage in stages)]
    if not own:
        return Evidence()
    teachers = [each for each in rows if each.stage == "teacher" and each not in own]
    most = max((each.num_steps or 0 for each in teachers), default=0)
    teachers = [each for each in teachers if each.num_steps == most]
    columns = {
        name: title for name, title in _titles(own[-1].extractor).items() if _filled(name, own)
    }
    chosen = _drawn(workdir, own, stages)
    return Evidence(
        header=list(columns.values()),
        rows=[[_text(getattr(each, name)) for name in columns] for each in (*teachers, *own)],
        extractor=own[-1].extractor,
        picture=_picture(_samples(workdir, chosen)) if chosen else None,
        caption=_caption(chosen) if chosen else "",
    )


def write_card(folder: epath.Path, template: str, evidence: Evidence, **values: Any) -> None:
    """Write README.md, the template TEMPLATE.md.jinja beside this file, and the picture beside it.

    Raises an error of jinja2 if the template names a value that isn't among `values`.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("guided_distill.formats", ""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template(f"{template}.md.jinja").render(
        evidence=evidence, picture=PICTURE, **values
    )
    write_text(folder / "README.md", text)
    if evidence.picture is not None:
        write_bytes(folder / PICTURE, evidence.picture)


def _is_of(row: Result, stage: epath.Path) -> bool:
    """Whether a row measured the newest checkpoint of a stage's folder."""
    names = (row.stage, stage_name(row.stage, row.sampler, row.num_steps))
    return stage.name in names and row.checkpoint in (None, checkpoint_id(stage))


def _titles(extractor: str) -> dict[str, str]:
    """The columns of the table, by the name of a field of `Result`."""
    measures = {name: metric_name(name, extractor) for name in _MEASURES}
    others = {"precision": "precision", "recall": "recall", "n": "samples"}
    return (
        {"stage": "stage", "sampler": "sampler", "num_steps": "steps", "w": "w"} | measures | others
    )


def _filled(name: str, rows: Sequence[Result]) -> bool:
    return any(getattr(each, name) is not None for each in rows)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _samples(workdir: epath.Path, row: Result) -> epath.Path:
    return workdir / "samples" / f"{row.file_stem}.npz"


def _drawn(
    workdir: epath.Path, rows: Sequence[Result], stages: Sequence[epath.Path]
) -> Result | None:
    """The row of the last stage whose samples were kept, nearest to w = 1 and with the most steps."""
    for stage in reversed(stages):
        kept = [each for each in rows if _is_of(each, stage) and _samples(workdir, each).exists()]
        if kept:
            return min(kept, key=lambda each: (abs((each.w or 0.0) - 1.0), -(each.num_steps or 0)))
    return None


def _picture(file: epath.Path) -> bytes:
    arrays = read_npz(file)
    images, labels = arrays["image"], arrays["label"]
    count = len(images) if images.ndim == 2 else IMAGES
    return png(grid_or_plot(images[:count], labels[:count], columns=COLUMNS_OF_IMAGES))


def _caption(row: Result) -> str:
    w = "" if row.w is None else f", w = {row.w:g}"
    return f"Samples of {stage_name(row.stage, row.sampler, row.num_steps)}{w}"
