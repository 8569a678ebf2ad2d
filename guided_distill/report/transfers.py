"""Files of style transfers: a figure to look at and the arrays to work with."""

from dataclasses import dataclass

import numpy as np
from etils import epath

from guided_distill.applications.style_transfer import (
    images_at,
    images_of_class,
    load_models,
    transfer,
)
from guided_distill.data import sources
from guided_distill.errors import UserError
from guided_distill.places import path_named
from guided_distill.report.samples import name_for, write_files
from guided_distill.runs.folder import read_config
from guided_distill.sampling.labels import class_index
from guided_distill.sampling.request import usual_w


@dataclass(frozen=True)
class TransferRequest:
    """What to transfer from one run to the run in `to`.

    images: a file, a folder, or "data" for test images of from_label, selected by `seed`; at most
    `count` are used. Labels are names of classes, as strings, or their numbers. encoder, decoder: folders
    of stages. None stands for the default.
    """

    to: epath.Path
    images: str
    from_label: int | str
    to_label: int | str
    encoder: str | None
    decoder: str | None
    w_encode: float | None
    w: float | None
    count: int
    seed: int


def transfer_to_files(
    workdir: epath.Path, request: TransferRequest, *, out: epath.Path
) -> tuple[epath.Path, epath.Path]:
    """Write a figure and an npz of images transferred from one run to another; return their paths.

    The figure's rows: the images, their reconstructions under their own label, and the transferred
    images. The npz holds the fields of `Transfer` and the two labels. Raises UserError if an input is
    missing, and as `transfer` does.
    """
    to, images, count, seed = request.to, request.images, request.count, request.seed
    if count < 1:
        raise UserError(f"--num is {count}; make it at least 1")
    models = load_models(workdir, to, encoder=request.encoder, decoder=request.decoder)
    about = models.encoder.description
    w_encode = usual_w(about, 0.0) if request.w_encode is None else request.w_encode
    w = usual_w(models.decoder.description) if request.w is None else request.w
    own = class_index(request.from_label, about, flag="--from_label")
    other = class_index(request.to_label, models.decoder.description, flag="--to_label")
    if images == "data":
        experiment = read_config(workdir)
        data = experiment.data
        test = sources.load_source(
            data.name, split="test", image_size=data.image_size, seed=experiment.seed
        )
        originals = images_of_class(test, own, count=count, seed=seed)
    else:
        originals = images_at(path_named(images), about, count=count)
    found = transfer(models, originals, from_label=own, to_label=other, w_encode=w_encode, w=w)
    names = [epath.Path(each.path).name for each in (models.encoder, models.decoder)]
    target = f"{other}" if to == workdir else f"{to.name}_{other}"
    rows = (found.image, found.returned, found.transferred)
    return write_files(
        out,
        name_for(
            f"{own}_to_{target}_{'_'.join(names)}_w{w_encode:g}_{w:g}_seed{seed}",
            *(float(w_encode), float(w), str(images), count, str(to)),
        ),
        drawn=np.concatenate(rows),
        colours=np.repeat(np.arange(len(rows)), len(originals)),
        columns=len(originals),
        arrays={**found._asdict(), "from_label": np.asarray(own), "to_label": np.asarray(other)},
    )
