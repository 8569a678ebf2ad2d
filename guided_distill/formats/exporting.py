"""Functions that the exporters share: the stages to export, and the new folder."""

import contextlib
from collections.abc import Iterator, Sequence

from etils import epath

from guided_distill.errors import UserError
from guided_distill.runs.folder import finished_stages
from guided_distill.runs.model_file import is_model_file
from guided_distill.runs.trained import Trained, load_finished
from guided_distill.storage import is_there, storage_error, whole


def stage_paths(workdir: epath.Path, stages: Sequence[str] | None) -> list[epath.Path]:
    """The folders of the named stages, or of all finished ones (None); a model file's own path.

    Raises UserError if stages are named for a model's file.
    """
    if not is_model_file(workdir):
        return [workdir / name for name in stages or finished_stages(workdir)]
    if stages:
        raise UserError(f"--stages is given, but {workdir} is one model's file: leave out --stages")
    return [workdir]


@contextlib.contextmanager
def new_folder(out: epath.Path) -> Iterator[epath.Path]:
    """Yields a temporary folder for an export, and renames it to `out` after the block.

    If the block raises, nothing is left. Raises UserError if `out` isn't empty or can't be written.
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
        # The temporary folder no longer exists.
        raise UserError(str(error).replace(str(part), str(out))) from error


def _check_empty(out: epath.Path) -> None:
    if is_there(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is not empty: choose another path")


def load_one_stage(workdir: epath.Path, out: epath.Path, stages: Sequence[str] | None) -> Trained:
    """Loads the stage to export to `out`: the one in `stages`, or the last finished one (None).

    Raises UserError if there are several or none, or if `out` isn't empty.
    """
    paths = stage_paths(workdir, stages)
    paths = paths if stages else paths[-1:]
    if len(paths) != 1:
        raise UserError(
            f"this format holds one finished stage, and {len(paths)} are given: name one with --stages"
        )
    _check_empty(out)
    return load_finished(paths[0])
