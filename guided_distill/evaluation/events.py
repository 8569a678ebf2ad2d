"""The rows of `results.csv` as TensorBoard events, in the run's folder `tensorboard/`.

Each extractor, number of samples and seed has a folder, which TensorBoard shows as a run; its steps are
sampling steps. Each row has its own file, so that none is written twice.
"""

import io
from collections.abc import Sequence
from dataclasses import fields

from etils import epath
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from guided_distill.evaluation.metrics.registry import METRICS
from guided_distill.evaluation.results import Result, Row
from guided_distill.pictures import grid_or_plot, png
from guided_distill.storage import read_npz
from guided_distill.training.metrics import EventFile
from guided_distill.training.processes import is_first

LOGGED = (*(column.name for metric in METRICS for column in fields(metric)), "seconds_per_sample")
COLUMNS_OF_IMAGES = 8


def log_rows(workdir: epath.Path, results: Sequence[Result]) -> None:
    """Write events for the rows that have none yet, each with a picture of its samples if there are any.

    With several processes, process 0 writes. Raises UserError if the events can't be written.
    """
    if not is_first():
        return
    newest = {each.file_stem: each for each in results}
    for result in results:
        if _files(workdir, result):
            continue
        # The file of samples belongs to the newest row, whatever its n and seed.
        file = workdir / "samples" / f"{result.file_stem}.npz"
        picture = _picture(file) if newest[result.file_stem] is result and file.exists() else None
        _log(_folder(workdir, result), result, picture)


def forget(workdir: epath.Path, result: Result) -> None:
    """Remove the events of an earlier row with the result's key."""
    for file in _files(workdir, result):
        file.unlink()


def _folder(workdir: epath.Path, result: Result) -> epath.Path:
    group = f"{result.extractor}_n{result.n}_seed{result.seed}".replace("/", "_")
    return workdir / "tensorboard" / group


def _files(workdir: epath.Path, result: Result) -> list[epath.Path]:
    folder = _folder(workdir, result)
    return list(folder.glob(f"*.{result.file_stem}")) if folder.exists() else []


def _log(folder: epath.Path, result: Result, picture: bytes | None) -> None:
    curve = Row(result.stage, result.sampler, None, result.w).file_stem
    values = [
        Summary.Value(tag=f"{name}/{curve}", simple_value=value)
        for name in LOGGED
        if (value := getattr(result, name)) is not None
    ]
    if picture is not None:
        width, height = Image.open(io.BytesIO(picture)).size
        image = Summary.Image(
            width=width, height=height, colorspace=3, encoded_image_string=picture
        )
        values.append(Summary.Value(tag=f"samples/{curve}", image=image))
    file = EventFile(folder, result.file_stem)
    file.add(Event(step=result.num_steps or 0, summary=Summary(value=values)))
    file.close()


def _picture(file: epath.Path) -> bytes:
    arrays = read_npz(file)
    return png(grid_or_plot(arrays["image"], arrays["label"], columns=COLUMNS_OF_IMAGES))
