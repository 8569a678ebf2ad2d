"""A run's results in a folder of their own: what sampling and further stages need, and no more."""

import json
from collections.abc import Sequence

from etils import epath

from guided_distill.errors import UserError
from guided_distill.layouts.companions import bring_companions
from guided_distill.pipeline import claim, finished_stages, read_config
from guided_distill.storage import write_text
from guided_distill.training.checkpoints import StageCheckpoints
from guided_distill.training.metrics import read_metrics
from guided_distill.training.trained import Trained, load_finished


def export_weights(
    workdir: epath.Path, out: epath.Path, *, stages: Sequence[str] | None = None
) -> list[epath.Path]:
    """Copy a run to `out` with each stage's result alone: no optimizer, no older checkpoints.

    `out` is then a run like any other: it can be sampled, evaluated, and trained on from its last
    stage. stages: folders of finished stages in the workdir; None for all of them. Answers the folders
    written. Raises UserError if a stage isn't finished, or if `out` holds another run.
    """
    experiment = read_config(workdir)
    names = list(stages or finished_stages(workdir))
    if not names:
        raise UserError(f"{workdir} has no finished stage: run `guided-distill train` on it first")
    trained = [load_finished(workdir / name) for name in names]
    claim(out, experiment)
    bring_companions(workdir, out)
    for name, each in zip(names, trained, strict=True):
        with StageCheckpoints(out / name, keep=1) as checkpoints:
            checkpoints.save_result(each.step, each.params, about=each.description.to_json())
            checkpoints.wait()
        rows = "".join(f"{json.dumps(row)}\n" for row in read_metrics(workdir / name))
        write_text(out / name / "metrics.jsonl", rows)
    return [out / name for name in names]


def load_one_stage(workdir: epath.Path, out: epath.Path, stages: Sequence[str] | None) -> Trained:
    """The stage to write to `out`: the one that is named, or the last finished one.

    Raises UserError unless it is one, and if `out` holds anything.
    """
    names = list(stages or finished_stages(workdir)[-1:])
    if len(names) != 1:
        raise UserError(
            f"this format holds one finished stage, and there are {len(names)}: name one with --stages"
        )
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty: choose another folder")
    return load_finished(workdir / names[0])
