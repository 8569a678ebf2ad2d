"""Exports in this package's own formats: a run without optimizer states, or one stage as one file."""

import json
from collections.abc import Sequence

from etils import epath

from guided_distill.errors import UserError
from guided_distill.formats.card import evidence_of, write_card
from guided_distill.formats.companions import COMPANIONS, bring_companions, check_companions
from guided_distill.formats.exporting import load_one_stage, new_folder, stage_paths
from guided_distill.runs.files import write_stages
from guided_distill.runs.folder import claim, folder_of, read_config
from guided_distill.runs.model_file import (
    DTYPES,
    SUFFIX,
    is_model_file,
    write_model_file,
)
from guided_distill.runs.trained import Trained, load_finished
from guided_distill.storage import write_text
from guided_distill.training.checkpoints import StageCheckpoints
from guided_distill.training.record import read_metrics


def export_weights(
    workdir: epath.Path,
    out: epath.Path,
    *,
    stages: Sequence[str] | None = None,
    repository: str | None = None,
) -> list[epath.Path]:
    """Copy a run to `out` with the final weights of each stage: no optimizer states or older checkpoints.

    `out` is a run like any other: it can be sampled and evaluated, and training can start from its last
    stage. workdir: a run, or a model's file, which becomes a run. stages: folders of finished stages in
    the workdir; None for all of them. repository: the one on a hub that `out` is for, which gets a model
    card. Returns the folders written. Raises UserError if a stage isn't finished, and as `new_folder`.
    """
    paths = stage_paths(workdir, stages)
    if not paths:
        raise UserError(f"{workdir} has no finished stage: run `guided-distill train` on it first")
    models = {path: load_finished(path) for path in paths}
    if is_model_file(workdir):
        about = models[workdir].description
        experiment, names = about.experiment, [about.stage_name]
    else:
        experiment, names = read_config(workdir), [path.name for path in paths]
    with new_folder(out) as folder:
        claim(folder, experiment)
        steps = [model.step for model in models.values()]
        write_stages(folder, dict(zip(names, steps, strict=True)))
        bring_companions(folder_of(workdir), folder)
        for name, (path, each) in zip(names, models.items(), strict=True):
            with StageCheckpoints(folder / name, keep=1) as checkpoints:
                checkpoints.save_result(each.step, each.params, about=each.description.to_json())
                checkpoints.wait()
            rows = "".join(f"{json.dumps(row)}\n" for row in read_metrics(path))
            write_text(folder / name / "metrics.jsonl", rows)
        if repository:
            _write_card(folder, repository, list(models.values()))
    return [out / name for name in names]


def export_safetensors(
    workdir: epath.Path,
    out: epath.Path,
    *,
    stages: Sequence[str] | None = None,
    repository: str | None = None,
    dtype: str = DTYPES[0],
) -> list[epath.Path]:
    """Write one finished stage to the file `out`, and a latent model's companions beside it.

    stages: the folder of the stage; None for the last finished one. repository: the one on a hub that the
    file's folder is for, which gets a model card. dtype: the dtype of the file's weights, one of DTYPES.
    Returns the paths written. Raises UserError as `load_one_stage`, for another
    dtype or suffix, and if companions of another model lie beside `out`.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    if out.suffix != SUFFIX:
        raise UserError(
            f"--out is {out}, and this format is one file: give a name that ends in {SUFFIX}"
        )
    trained = load_one_stage(workdir, out, stages)
    about = trained.description
    written = [out]
    if about.latent:
        check_companions(folder_of(workdir), out.parent)
    write_model_file(out, trained.params, about=about.to_json(), dtype=dtype)
    if about.latent:
        bring_companions(folder_of(workdir), out.parent)
        written.append(out.parent / COMPANIONS)
    if repository:
        _write_card(out.parent, repository, [trained], file=out.name)
    return written


def _write_card(
    folder: epath.Path, repository: str, models: Sequence[Trained], *, file: str | None = None
) -> None:
    """Write the card of a run's folder, or of the folder that holds a model's file."""
    about = models[-1].description
    write_card(
        folder,
        "own_card",
        evidence_of([epath.Path(each.path) for each in models]),
        about=about,
        models=[each.description for each in models],
        repository=repository,
        local=repository.rpartition("/")[2],
        file=file,
        w=None
        if about.w_min is None or about.w_max is None
        else min(max(1.0, about.w_min), about.w_max),
    )
