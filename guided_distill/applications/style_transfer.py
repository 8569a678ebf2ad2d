"""Style transfer: images of one domain become images of another, through the same noise.

Dual diffusion implicit bridges (Su et al. 2022), as Meng et al. 2023 use them: the encoder student of
domain A maps an image to noise, and the deterministic student of domain B maps this noise to an image.
The two domains are two runs, or two classes of one run.
"""

from typing import NamedTuple

import numpy as np
from etils import epath

from guided_distill import kinds
from guided_distill.data.images import read_images
from guided_distill.data.source import Source
from guided_distill.diffusion.samplers import ENCODE
from guided_distill.errors import UserError
from guided_distill.runs.folder import read_config
from guided_distill.runs.trained import Description, Trained, load_finished
from guided_distill.sampling.labels import of_labels
from guided_distill.sampling.request import Request
from guided_distill.sampling.sample import encode, sample
from guided_distill.stages import all_stages
from guided_distill.training.record import latest_step

NEAREST_STEPS = 8
"""The default round is the one with N nearest to this."""


class Models(NamedTuple):
    """The students for a transfer from A to B: A's encoder, A's decoder (returner) and B's decoder."""

    encoder: Trained
    returner: Trained
    decoder: Trained


class Transfer(NamedTuple):
    """Arrays [n, *data_shape]: images, their noise, and the noise decoded in the images' own class
    (returned) and in the other class (transferred).
    """

    image: np.ndarray
    noise: np.ndarray
    returned: np.ndarray
    transferred: np.ndarray


def transfer(
    models: Models,
    images: np.ndarray,
    *,
    from_label: int,
    to_label: int,
    w_encode: float,
    w: float,
) -> Transfer:
    """Encode images [n, *data_shape] at w_encode under from_label; decode at w under both labels.

    Raises UserError if a model wasn't trained for the class or w.
    """
    own, other = (of_labels([label] * len(images)) for label in (from_label, to_label))
    noise = encode(models.encoder, images, Request(condition=own, w=w_encode))
    returned = sample(models.returner, Request(condition=own, w=w, noise=noise))
    transferred = sample(models.decoder, Request(condition=other, w=w, noise=noise))
    return Transfer(images, noise, returned, transferred)


def load_models(
    workdir: epath.Path, to: epath.Path, *, encoder: str | None, decoder: str | None
) -> Models:
    """Load the encoder of the run in `workdir`, and the decoders of that run and of the run in `to`.

    encoder, decoder: names of stages' folders; both runs must have the decoder. None chooses the finished
    round with N nearest to `NEAREST_STEPS`. Raises UserError if there is none, if the decoder is
    stochastic, if the runs are of latents, or if the two runs' data differ in shape.
    """
    models = Models(
        encoder=load_finished(workdir / (encoder or _nearest_round(workdir, ENCODE))),
        returner=load_finished(workdir / (decoder or _nearest_round(workdir, "ddim"))),
        decoder=load_finished(to / (decoder or _nearest_round(to, "ddim"))),
    )
    if models.decoder.description.sampler == "stochastic":
        raise UserError(
            f"--decoder is {decoder}, a stochastic student: give a deterministic one, such as "
            f"halving_ddim_{NEAREST_STEPS}"
        )
    if models.encoder.description.latent:
        raise UserError(f"{workdir} is a run of latents: choose a run of pixels for style transfer")
    shapes = [each.description.data_shape for each in (models.encoder, models.decoder)]
    if shapes[0] != shapes[1]:
        here, there = (" x ".join(map(str, shape)) for shape in shapes)
        raise UserError(
            f"--workdir {workdir} has data of {here} and --to {to} of {there}: choose runs of one shape"
        )
    return models


def _nearest_round(workdir: epath.Path, sampler: str) -> str:
    rounds = [
        stage
        for stage in all_stages(read_config(workdir))
        if stage.sampler == sampler and latest_step(workdir / stage.name) == stage.total_steps
    ]
    if not rounds:
        raise UserError(
            f"{workdir} has no finished round for the sampler {sampler}: train one with "
            f"config.halving.samplers=('ddim', '{ENCODE}')"
        )
    return min(rounds, key=lambda stage: abs((stage.num_steps or 0) - NEAREST_STEPS)).name


def images_of_class(source: Source, label: int, *, count: int, seed: int) -> np.ndarray:
    """Return up to `count` random images of a class. Raises UserError if it has none."""
    kinds.check("--seed", seed, kinds.Seed)
    order = np.random.default_rng(seed).permutation(source.size)
    found: list[np.ndarray] = []
    for examples in source.chunks_of(order):
        found.extend(examples["image"][examples["label"] == label])
        if len(found) >= count:
            break
    if not found:
        raise UserError(
            f"--images data: the {source.split} split of {source.name} has no images of class "
            f"{source.class_names[label]}: choose another --from_label"
        )
    return np.stack(found[:count])


def images_at(path: epath.Path, about: Description, *, count: int) -> np.ndarray:
    """Return up to `count` images from a file or folder. Raises UserError if none can be read."""
    if not about.network().of_images:
        raise UserError(
            f"--images is {path}, but this run has points, not images: give --images data"
        )
    return read_images(path, shape=about.data_shape, limit=count)
