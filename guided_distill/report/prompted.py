"""Files of images made from prompts: a PNG each, with its settings as metadata, and a sheet of all."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from PIL.PngImagePlugin import PngInfo

from guided_distill.applications.text_to_image import (
    TextToImage,
    edit,
    generate,
    inpaint,
    load_text_to_image,
)
from guided_distill.data.images import read_images, read_mask, size_at
from guided_distill.errors import UserError
from guided_distill.files import read_text
from guided_distill.pictures import image_grid, png
from guided_distill.report.samples import name_for
from guided_distill.runs.folder import stage_to_sample
from guided_distill.sampling.request import Options, given_or_trained
from guided_distill.storage import write_bytes

METADATA = "guided_distill"
"""The text chunk of a PNG that holds its settings as JSON."""


@dataclass(frozen=True)
class PromptRequest:
    """Prompts, one for each image, and sampling options."""

    prompts: Sequence[str]
    options: Options


def read_prompts(
    given: Sequence[str] | None, file: epath.Path | None, *, num: int
) -> tuple[str, ...]:
    """The prompts given and those in a file, one per line, each repeated `num` times.

    Raises UserError if there are none.
    """
    if num < 1:
        raise UserError(f"--num is {num}; make it at least 1")
    prompts = list(given or ())
    if file is not None:
        lines = read_text(file, what="--prompts ").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError("there is no prompt: give --prompt, or --prompts and a file of prompts")
    return tuple(prompt for prompt in prompts for _ in range(num))


def generate_to_files(
    *, workdir: epath.Path, stage: str | None, request: PromptRequest, out: epath.Path
) -> list[epath.Path]:
    """Generate an image for each prompt; return the files. Raises UserError as `generate` does."""
    model, request = _open(workdir, stage, request)
    images = generate(model, request.prompts, **request.options.keywords)
    return _write(out, "generate", model, request, images, {})


def edit_to_files(
    *,
    workdir: epath.Path,
    stage: str | None,
    request: PromptRequest,
    out: epath.Path,
    image: epath.Path,
    strength: float,
) -> list[epath.Path]:
    """Edit an image to fit each prompt; return the files. Raises UserError as `edit` does."""
    model, request = _open(workdir, stage, request)
    images = _repeated(_read(image, model), request)
    edited = edit(model, images, request.prompts, strength=strength, **request.options.keywords)
    settings = {"image": image, "strength": strength, "steps_run": edited.steps_run}
    return _write(out, "edit", model, request, edited.images, settings)


def inpaint_to_files(
    *,
    workdir: epath.Path,
    stage: str | None,
    request: PromptRequest,
    out: epath.Path,
    image: epath.Path,
    mask: epath.Path,
) -> list[epath.Path]:
    """Paint the region where the mask is white to fit each prompt; return the files.

    Raises UserError as `inpaint` does, and if the mask and the image differ in size.
    """
    model, request = _open(workdir, stage, request)
    sizes = [size_at(path) for path in (image, mask)]
    if sizes[0] != sizes[1]:
        width, height = sizes[0]
        raise UserError(
            f"--mask {mask} is {sizes[1][0]} x {sizes[1][1]} pixels and the image is {width} x {height}: "
            f"give a mask of the image's size"
        )
    white = read_mask(mask, shape=model.image_shape[:2])
    painted = inpaint(
        model,
        _repeated(_read(image, model), request),
        _repeated(white, request),
        request.prompts,
        **request.options.keywords,
    )
    settings = {"image": image, "mask": mask}
    return _write(out, "inpaint", model, request, painted, settings)


def _open(
    workdir: epath.Path, stage: str | None, request: PromptRequest
) -> tuple[TextToImage, PromptRequest]:
    """The model, and the request with the model's usual w if it has none."""
    model = load_text_to_image(stage_to_sample(workdir, stage))
    options = request.options.with_w(model.trained.description)
    return model, dataclasses.replace(request, options=options)


def _read(path: epath.Path, model: TextToImage) -> np.ndarray:
    return read_images(path, shape=model.image_shape, limit=1)[0]


def _repeated(array: np.ndarray, request: PromptRequest) -> np.ndarray:
    return np.repeat(array[None], len(request.prompts), axis=0)


def _write(
    out: epath.Path,
    verb: str,
    model: TextToImage,
    request: PromptRequest,
    images: np.ndarray,
    more: Mapping[str, Any],
) -> list[epath.Path]:
    about = model.trained.description
    stage = model.trained.name
    options = request.options
    num_steps, sampler = given_or_trained(
        about, num_steps=options.num_steps, sampler=options.sampler
    )
    settings = {
        "verb": verb,
        "stage": stage,
        **request.options.keywords,
        "num_steps": num_steps,
        "sampler": sampler,
        "package_version": about.package_version,
        # A path means nothing on another machine: only its last part is kept.
        **{name: each.name if name in ("image", "mask") else each for name, each in more.items()},
    }
    named = {"w": f"{options.w:g}", "seed": options.seed, "steps": num_steps}
    named |= {name: epath.Path(str(value)).stem for name, value in more.items() if name == "image"}
    named |= {name: value for name, value in more.items() if name == "strength"}
    words = "_".join([verb, stage, *(f"{name}{value}" for name, value in named.items())])
    stem = name_for(words, *settings.items(), *map(str, more.values()), *request.prompts)
    paths = []
    for index, (prompt, pixels) in enumerate(zip(request.prompts, images, strict=True)):
        information = PngInfo()
        information.add_itxt(METADATA, json.dumps({**settings, "prompt": prompt, "index": index}))
        words = re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:40]
        paths.append(out / f"{stem}_{index:04d}_{words}.png")
        drawn = image_grid(pixels[None], columns=1, scale=1)
        write_bytes(paths[-1], png(drawn, information=information))
    if len(images) > 1:
        paths.append(out / f"{stem}_sheet.png")
        columns = int(np.ceil(np.sqrt(len(images))))
        write_bytes(paths[-1], png(image_grid(images, columns=columns, scale=1)))
    return paths
