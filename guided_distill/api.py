"""The API for notebooks: load a trained model, then sample, edit, in-paint or encode with it.

    import guided_distill

    student = guided_distill.load("runs/digits/halving_ddim_4")
    images = student.sample(labels=[3, 7], w=1.0)

A request that can't be met raises guided_distill.UserError, whose message says in one sentence what to
do. The message may name an option by its flag, such as --num_steps for num_steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from guided_distill.applications import text_to_image
from guided_distill.applications.text_to_image import TextToImage, load_text_to_image
from guided_distill.diffusion.guidance import Condition
from guided_distill.errors import UserError
from guided_distill.places import path_named
from guided_distill.runs.folder import stage_to_sample
from guided_distill.runs.trained import Description, Trained, load_finished
from guided_distill.sampling.labels import class_index, of_labels
from guided_distill.sampling.latents import LatentSpace, load_latent_space
from guided_distill.sampling.request import Request, usual_w
from guided_distill.sampling.sample import encode, sample


def load(path: str | epath.Path) -> "Model":
    """Load a stage's folder, a model's file, or the last finished stage of a run that samples.

    Raises UserError if there is none, or if a run on latents lacks its companions folder.
    """
    directory = path_named(str(path))
    if not (directory / "checkpoints").exists():
        directory = stage_to_sample(directory, None)
    trained = load_finished(directory)
    if "text" in trained.description.condition_shapes:
        prompted = load_text_to_image(directory)
        return Model(prompted.trained, prompted.space, prompted)
    space = load_latent_space(directory.parent) if trained.description.latent else None
    return Model(trained, space)


@dataclass(frozen=True)
class Model:
    """A trained stage. A student uses its own number of steps and its own sampler by default.

    w is the paper's guidance weight; it defaults to `usual_w` or, for `encode`, to the trained w nearest
    to 0. space: the autoencoder of a latent model. prompted: the text-to-image model, if the stage is
    conditioned on text.
    """

    trained: Trained
    space: LatentSpace | None = None
    prompted: TextToImage | None = None

    @property
    def about(self) -> Description:
        """The stage, number of steps, sampler, range of w, classes and whole config."""
        return self.trained.description

    @property
    def usual_w(self) -> float:
        """The default guidance weight: 1, or the trained w nearest to it."""
        return usual_w(self.about)

    def sample(
        self,
        *,
        labels: Sequence[int | str] | None = None,
        prompts: Sequence[str] | None = None,
        w: float | None = None,
        noise: np.ndarray | None = None,
        **request: Any,
    ) -> np.ndarray:
        """Return an image for each label or prompt, float32 [n, H, W, C] in [-1, 1], or points [n, 2].

        Give labels (names of classes as strings, or their numbers from 0) or prompts, whichever the model
        is conditioned on. noise: the output of `encode`. request: num_steps, sampler, seed, batch_size
        and allow_untrained, as in `guided_distill.sampling.request.Request`. Image i depends only on
        (seed, i) and its condition.
        """
        w = self.usual_w if w is None else w
        if self.prompted is not None:
            if prompts is None or labels is not None or noise is not None:
                raise UserError(
                    "this model is conditioned on text: give prompts, and no labels or noise"
                )
            return text_to_image.generate(self.prompted, prompts, w=w, **request)
        if prompts is not None:
            raise UserError("this model is conditioned on classes, not on text: give labels")
        samples = sample(self.trained, Request(self._of_classes(labels), w, noise=noise, **request))
        return self.space.to_images(samples) if self.space else samples

    def edit(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        *,
        strength: float,
        w: float | None = None,
        **request: Any,
    ) -> np.ndarray:
        """Return images [n, H, W, C] in [-1, 1], each edited to fit its prompt; strength 1 changes most.

        Raises UserError as `applications.text_to_image.edit` does, where the number of steps is given.
        """
        model = self._of_texts(images, prompts)
        w = self.usual_w if w is None else w
        edited = text_to_image.edit(model, images, prompts, strength=strength, w=w, **request)
        return edited.images

    def inpaint(
        self,
        images: np.ndarray,
        masks: np.ndarray,
        prompts: Sequence[str],
        *,
        w: float | None = None,
        **request: Any,
    ) -> np.ndarray:
        """Return images [n, H, W, C], painted to fit their prompts where masks [n, H, W] are True."""
        model = self._of_texts(images, prompts)
        w = self.usual_w if w is None else w
        if masks.dtype != bool or masks.shape != images.shape[:-1]:
            raise UserError(
                f"masks are {masks.dtype} {list(masks.shape)}: give bool {list(images.shape[:-1])}, True "
                f"in the region to paint"
            )
        return text_to_image.inpaint(model, images, masks, prompts, w=w, **request)

    def encode(
        self,
        images: np.ndarray,
        *,
        labels: Sequence[int | str],
        w: float | None = None,
        **request: Any,
    ) -> np.ndarray:
        """Return the noise [n, *data_shape] that encodes images [n, H, W, C] of these classes.

        Works with an encoder student, or in many steps with the teacher or the stage-one student.
        request: num_steps, batch_size.
        """
        if self.prompted is not None:
            raise UserError(
                "a model conditioned on text can't encode: choose one that is conditioned on classes"
            )
        values = self.space.to_latents(images) if self.space else images
        if values.shape[1:] != self.about.data_shape or len(values) != len(labels):
            raise UserError(
                f"there are images {list(np.shape(images))} and {len(labels)} labels: give a label for "
                f"each image, and images of the model's size"
            )
        if w is None:
            w = usual_w(self.about, 0.0)
        return encode(self.trained, values, Request(self._of_classes(labels), w, **request))

    def _of_classes(self, labels: Sequence[int | str] | None) -> Condition:
        if labels is None or len(labels) == 0:
            names = ", ".join(self.about.class_names[:10])
            raise UserError(
                f"there are no labels: give names or numbers of classes, such as {names}"
            )
        return of_labels([class_index(label, self.about, flag="labels") for label in labels])

    def _of_texts(self, images: np.ndarray, prompts: Sequence[str]) -> TextToImage:
        if self.prompted is None:
            raise UserError(
                "this model is conditioned on classes: edit and in-paint with one conditioned on text"
            )
        expected = (len(prompts), *self.prompted.image_shape)
        if images.shape != expected:
            raise UserError(
                f"images have shape {list(images.shape)}: give one for each prompt, {list(expected)}"
            )
        return self.prompted
