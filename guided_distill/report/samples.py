"""Files of a stage's samples: a picture to look at and the arrays to work with."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from guided_distill.errors import UserError
from guided_distill.pictures import image_grid, png, point_plot
from guided_distill.runs.folder import folder_of, stage_to_sample
from guided_distill.runs.trained import load_finished
from guided_distill.sampling.labels import class_index, of_labels
from guided_distill.sampling.latents import load_latent_space
from guided_distill.sampling.request import Options, Request, given_or_trained
from guided_distill.sampling.sample import sample
from guided_distill.storage import npz_bytes, write_bytes
from guided_distill.training.processes import is_first

SMALLEST_SIDE = 64
"""Images are enlarged by a whole factor to at least this many pixels."""


def sample_to_files(
    workdir: epath.Path,
    *,
    stage: str | None,
    count: int,
    labels: Sequence[int | str] | None,
    options: Options,
    out: epath.Path,
) -> tuple[epath.Path, epath.Path]:
    """Write a picture and an npz (image, label) of `count` samples; return their paths.

    workdir, stage: as in `stage_to_sample`. labels: names or numbers, used in turn; None for all
    classes. Raises UserError if the stage is missing, and as `sample` does.
    """
    if count < 1:
        raise UserError(f"--num is {count}; make it at least 1")
    trained = load_finished(stage_to_sample(workdir, stage))
    about = trained.description
    if "label" not in about.condition_shapes:
        raise UserError(
            f"{trained.path} is conditioned on text, not on labels: use `guided-distill generate`"
        )
    options = options.with_w(about)
    num_classes = len(about.class_names)
    chosen = range(num_classes) if labels is None else labels
    classes = [class_index(label, about, flag="--labels") for label in chosen]
    all_labels = np.resize(classes, count)
    images = sample(trained, Request(of_labels(all_labels), **options.keywords))
    if about.latent:
        images = load_latent_space(folder_of(workdir)).to_images(images)
    steps, by = given_or_trained(about, num_steps=options.num_steps, sampler=options.sampler)
    words = f"{trained.name}_{by}_{steps}_w{options.w:g}_seed{options.seed}"
    stem = name_for(words, options.w, all_labels.tolist())
    arrays = {"image": images, "label": all_labels}
    return write_files(
        out, stem, drawn=images, colours=all_labels, columns=num_classes, arrays=arrays
    )


def name_for(words: str, *request: object) -> str:
    """A file name unique to the request: `words`, and 6 hex digits of a hash of the request."""
    return f"{words}_{hashlib.sha256(repr(request).encode()).hexdigest()[:6]}"


def write_files(
    out: epath.Path,
    stem: str,
    *,
    drawn: np.ndarray,
    colours: np.ndarray,
    columns: int,
    arrays: Mapping[str, Any],
) -> tuple[epath.Path, epath.Path]:
    """Write out/stem.png and out/stem.npz, which holds `arrays`; return their paths.

    drawn: images [n, H, W, C], drawn row by row, or points [n, 2] with a colour each. Raises UserError
    if the folder can't be written. With several processes, process 0 writes.
    """
    picture, data = out / f"{stem}.png", out / f"{stem}.npz"
    if is_first():
        write_bytes(picture, _drawn(drawn, colours, columns=columns))
        write_bytes(data, npz_bytes(**arrays))
    return picture, data


def _drawn(samples: np.ndarray, colours: np.ndarray, *, columns: int) -> bytes:
    """A PNG: a grid of images [n, H, W, C], or a plot of points [n, 2]."""
    if samples.ndim == 2:
        return png(point_plot(samples, colours), dpi=100)
    scale = -(-SMALLEST_SIDE // samples.shape[1])
    return png(image_grid(samples, columns=columns, scale=scale))
