"""A run's autoencoder: pixels to latents and back."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from etils import epath

from guided_distill.errors import UserError
from guided_distill.formats.companions import COMPANIONS
from guided_distill.formats.diffusers_autoencoder import read_autoencoder
from guided_distill.models.registry import Params
from guided_distill.models.stable_diffusion.autoencoder import AutoencoderKL, VQModel

BATCH_SIZE = 8
"""Images per call of an autoencoder; an image of 512 pixels takes 1 GB."""


def autoencoder_folder(workdir: epath.Path) -> epath.Path:
    """The folder of a run's autoencoder, in diffusers' layout."""
    return workdir / COMPANIONS / "vae"


@dataclass(frozen=True)
class LatentSpace:
    """An autoencoder with its weights: pixels [n, H, W, C] in [-1, 1] to latents and back."""

    module: AutoencoderKL | VQModel
    params: Params = field(repr=False)

    def to_latents(self, images: np.ndarray) -> np.ndarray:
        """Encode images to latents [n, h, w, c] of the diffusion, the means if latents are random."""
        return self._batched(self._encode, images)

    def to_images(self, latents: np.ndarray) -> np.ndarray:
        """Decode latents [n, h, w, c] of the diffusion to images, clipped to [-1, 1]."""
        return np.clip(self._batched(self._decode, latents), -1.0, 1.0)

    @functools.cached_property
    def _encode(self) -> Callable[..., Any]:
        return jax.jit(functools.partial(self.module.apply, method="to_latents"))

    @functools.cached_property
    def _decode(self) -> Callable[..., Any]:
        return jax.jit(functools.partial(self.module.apply, method="to_images"))

    def _batched(self, run: Callable[..., Any], arrays: np.ndarray) -> np.ndarray:
        found = []
        for start in range(0, len(arrays), BATCH_SIZE):
            batch = arrays[start : start + BATCH_SIZE]
            # All batches have one size, so there is one compilation.
            size = min(BATCH_SIZE, len(arrays))
            padded = np.pad(batch, [(0, size - len(batch)), *[(0, 0)] * (arrays.ndim - 1)])
            found.append(np.asarray(run({"params": self.params}, padded))[: len(batch)])
        return np.concatenate(found)


def load_latent_space(workdir: epath.Path) -> LatentSpace:
    """Load the autoencoder of a run. Raises UserError if it has none, or one that isn't supported."""
    folder = autoencoder_folder(workdir)
    if not folder.exists():
        raise UserError(
            f"{workdir} has no autoencoder ({folder.name} in its {COMPANIONS} is missing): import a "
            f"model, or train a run whose config has one"
        )
    return LatentSpace(*read_autoencoder(folder))
