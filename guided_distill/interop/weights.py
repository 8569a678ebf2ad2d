"""A run's results in a folder of their own: what sampling and further stages need, and no more."""

import contextlib
import json
from collections.abc import Iterator, Sequence

from etils import epath

from guided_distill.errors import UserError
from guided_distill.layouts.companions import bring_companions
from guided_distill.pipeline import claim
from guided_distill.runs import finished_stages, read_config
from guided_distill.storage import is_there, storage_error, whole, write_text
from guided_distill.training.checkpoints import StageCheckpoints
from guided_distill.training.metrics import read_metrics
from guided_distill.training.trained import Trained, load_finished


def export_weights(
    workdir: epath.Path, out: epath.Path, *, stages: Sequence[str] | None = None
) -> list[epath.Path]:
    """Copy a run to `out` with each stage's result alone: no optimizer, no older checkpoints.

    `out` is then a run like any other: it can be sampled, evaluated, and trained on from its last
    stage. stages: folders of finished stages in the workdir; None for all of them. Returns the folders
    written. Raises UserError if a stage isn't finished, and as `new_folder`.
    """
    names = list(stages or ()) or finished_stages(workdir)
    if not names:
        raise UserError(f"{workdir} has no finished stage: run `guided-distill train` on it first")
    trained = [load_finished(workdir / name) for name in names]
    with new_folder(out) as folder:
        claim(folder, read_config(workdir))
        bring_companions(workdir, folder)
        for name, each in zip(names, trained, strict=True):
            with StageCheckpoints(folder / name, keep=1) as checkpoints:
                checkpoints.save_result(each.step, each.params, about=each.description.to_json())
                checkpoints.wait()
            rows = "".join(f"{json.dumps(row)}\n" for row in read_metrics(workdir / name))
            write_text(folder / name / "metrics.jsonl", rows)
    return [out / name for name in names]


@contextlib.contextmanager
def new_folder(out: epath.Path) -> Iterator[epath.Path]:
    """Yields a place for an export, which becomes the folder `out` after the block.

    If the block raises, nothing is written. Raises UserError if `out` is not empty, or can't be written.
    """
    _check_empty(out)
    part = out
    try:
        with whole(out) as part:
            part.mkdir()
            yield part
    except OSError as error:
        raise storage_error(out, error) from error
    except UserError as error:
        # The place is gone by now.
        raise UserError(str(error).replace(str(part), str(out))) from error


def _check_empty(out: epath.Path) -> None:
    if is_there(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is not empty: choose another folder")


def load_one_stage(workdir: epath.Path, out: epath.Path, stages: Sequence[str] | None) -> Trained:
    """The stage to write to `out`: the one that is named, or the last finished one.

    Raises UserError unless it is one, and if `out` holds anything.
    """
    names = list(stages or ()) or finished_stages(workdir)[-1:]
    if len(names) != 1:
        raise UserError(
            f"this format holds one finished stage, and there are {len(names)}: name one with --stages"
        )
    _check_empty(out)
    return load_finished(workdir / names[0])
