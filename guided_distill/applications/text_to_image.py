"""Text to image, text-guided editing, and in-painting (Meng et al. 2023).

They combine a distilled denoiser of latents with the autoencoder and text encoder of its run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from guided_distill.data.encoded import INPAINT
from guided_distill.diffusion.guidance import Condition
from guided_distill.diffusion.process import add_noise
from guided_distill.diffusion.samplers import Known
from guided_distill.errors import UserError
from guided_distill.formats.companions import COMPANIONS
from guided_distill.runs.trained import Trained, load_finished
from guided_distill.sampling.latents import LatentSpace, load_latent_space
from guided_distill.sampling.request import Request, check_request
from guided_distill.sampling.sample import initial_noise, sample
from guided_distill.text.encoder import TextEncoder
from guided_distill.text.registry import load_text_encoder

_BATCH = 8
"""The default batch size: large latents need much memory."""


@dataclass(frozen=True)
class TextToImage:
    """A stage's denoiser, with its autoencoder and text encoder."""

    trained: Trained
    space: LatentSpace
    text_encoder: TextEncoder

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images."""
        height, width, _ = self.trained.description.data_shape
        factor = 2 ** (len(self.space.module.block_out_channels) - 1)
        return factor * height, factor * width, self.space.module.image_channels


def load_text_to_image(directory: epath.Path) -> TextToImage:
    """Load the stage in this folder, with the companions (autoencoder and text encoder) of its run.

    Raises UserError if the stage isn't finished, isn't conditioned on texts, or lacks its companions.
    """
    trained = load_finished(directory)
    if "text" not in trained.description.condition_shapes:
        raise UserError(
            f"{directory} is conditioned on {' and '.join(trained.description.condition_shapes)}, not on "
            f"texts: use `guided-distill sample`"
        )
    workdir = directory.parent
    return TextToImage(
        trained, load_latent_space(workdir), load_text_encoder(f"companions:{workdir / COMPANIONS}")
    )


class Edited(NamedTuple):
    """Images [n, H, W, C] in [-1, 1], and how many of the sampler's steps were run."""

    images: np.ndarray
    steps_run: int


def generate(
    model: TextToImage, prompts: Sequence[str], *, w: float, seed: int = 0, **request: Any
) -> np.ndarray:
    """Sample images [n, H, W, C] in [-1, 1], one per prompt; image i depends on (seed, i) and its prompt.

    request: num_steps, sampler, batch_size and allow_untrained, as in `sample`. Raises UserError as
    `sample` does, and for an in-painting network.
    """
    _refuse_inpainting(model)
    condition = {"text": model.text_encoder.encode(prompts)}
    latents = _sample(model, condition, w=w, seed=seed, **request)
    return model.space.to_images(latents)


def edit(
    model: TextToImage,
    images: np.ndarray,
    prompts: Sequence[str],
    *,
    strength: float,
    w: float,
    seed: int = 0,
    **request: Any,
) -> Edited:
    """Add noise to images [n, H, W, C] up to a time t and sample from there (SDEdit, Meng et al. 2022).

    strength: the time in (0, 1]. It is rounded down to the sampler's grid i/N, as in diffusers, and i
    steps run. Raises UserError if no step would run, and as `generate` does.
    """
    _refuse_inpainting(model)
    condition = {"text": model.text_encoder.encode(prompts)}
    num_steps = resolve(model, condition, w=w, **request)[0]
    first = int(num_steps * strength) if 0.0 < strength <= 1.0 else 0
    if first < 1:
        # Rounded up: with 0.333333, none of three steps would run.
        least = math.ceil(1000 / num_steps) / 1000
        raise UserError(
            f"--strength is {strength}: give {least:g} to 1, so that at least one of the "
            f"{num_steps} steps runs"
        )
    schedule = model.trained.description.network().schedule
    level = schedule(jnp.full(len(images), first / num_steps))
    clean = model.space.to_latents(images)
    noise = initial_noise(model.trained.description, len(images), seed=seed)
    z = np.asarray(add_noise(jnp.asarray(clean), jnp.asarray(noise), log_snr=level))
    latents = _sample(model, condition, w=w, seed=seed, noise=z, first=first, **request)
    return Edited(model.space.to_images(latents), first)


def inpaint(
    model: TextToImage,
    images: np.ndarray,
    masks: np.ndarray,
    prompts: Sequence[str],
    *,
    w: float,
    seed: int = 0,
    **request: Any,
) -> np.ndarray:
    """Paint images [n, H, W, C] where masks [n, H, W], bool, are True; other pixels stay unchanged.

    An in-painting network is conditioned on the mask and the masked image. For other networks, the
    latents without a masked pixel replace those of every prediction. Raises UserError as `generate` does.
    """
    condition: Condition = {"text": model.text_encoder.encode(prompts)}
    noise = initial_noise(model.trained.description, len(images), seed=seed)
    size = images.shape[1] // noise.shape[1]
    known = None
    if INPAINT in model.trained.description.condition_shapes:
        # The mask is resized by the nearest pixel, as in diffusers and in the network's training.
        mask = masks[:, ::size, ::size, None]
        around = model.space.to_latents(np.where(masks[..., None], 0.0, images))
        condition = {**condition, INPAINT: np.concatenate([mask, around], axis=-1)}
    else:
        # A latent with any masked pixel is free to change, because it encodes some of the hole.
        count, height, width, _ = noise.shape
        free = masks.reshape(count, height, size, width, size).max((2, 4))[..., None]
        known = Known(model.space.to_latents(images), noise, free)
    latents = _sample(model, condition, w=w, seed=seed, noise=noise, known=known, **request)
    return np.where(masks[..., None], model.space.to_images(latents), images)


def _refuse_inpainting(model: TextToImage) -> None:
    if INPAINT in model.trained.description.condition_shapes:
        raise UserError("this is an in-painting network: use `guided-distill inpaint`")


def resolve(model: TextToImage, condition: Condition, **request: Any) -> tuple[int, str]:
    """Return the number of steps and the sampler of a request. Raises UserError as `sample` does."""
    resolved = check_request(model.trained.description, Request(condition, **request))
    assert resolved.num_steps is not None
    assert resolved.sampler is not None
    return resolved.num_steps, resolved.sampler


def _sample(model: TextToImage, condition: Condition, **request: Any) -> np.ndarray:
    # A network that takes w needs no null condition, because it is already guided.
    takes_w = model.trained.description.w_min is not None
    null = None if takes_w else {"text": model.text_encoder.encode([""])[0]}
    batch_size = min(len(condition["text"]), _BATCH)
    request = {"batch_size": batch_size, **request}
    return sample(model.trained, Request(condition=condition, null=null, **request))
