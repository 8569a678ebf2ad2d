"""What a notebook needs: load what was trained, then sample, edit, in-paint or encode with it.

    import guided_distill

    student = guided_distill.load("runs/digits/halving_ddim_4")
    images = student.sample(labels=[3, 7], w=1.0)

Every request that can't be met raises guided_distill.UserError, a sentence that says what to do. It may
call an option as the command line does, --num_steps for num_steps.
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
    """The stage in a folder, or of a run's folder the last finished one that samples; or a model's file.

    Raises UserError if there is none, or if a run of latents lacks its companions.
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
    """A trained stage. Students know their number of steps and their sampler; w is the paper's, and
    `usual_w` where it is left out (of `encode`, what was trained nearest to 0).

    space: the autoencoder of a model of latents. prompted: what makes images of texts.
    """

    trained: Trained
    space: LatentSpace | None = None
    prompted: TextToImage | None = None

    @property
    def about(self) -> Description:
        """Its stage, number of steps, sampler, range of w, classes and whole config."""
        return self.trained.description

    @property
    def usual_w(self) -> float:
        """The guidance weight where none is given: 1, or what was trained nearest to it."""
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
        """An image for each class or text, float32 [n, H, W, C] in [-1, 1], or a point [n, 2].

        labels: names of classes, strings, or their numbers from 0; prompts: texts; the one that the model
        is conditioned on. noise: what `encode` returned. request: num_steps, sampler, seed, batch_size
        and allow_untrained, as of `guided_distill.sampling.request.Request`. Image i depends on (seed, i)
        and its condition.
        """
        w = self.usual_w if w is None else w
        if self.prompted is not None:
            if prompts is None or labels is not None or noise is not None:
                raise UserError(
                    "this model is conditioned on texts: give prompts, and no labels or noise"
                )
            return text_to_image.generate(self.prompted, prompts, w=w, **request)
        if prompts is not None:
            raise UserError("this model is conditioned on classes, not on texts: give labels")
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
        """Images [n, H, W, C] in [-1, 1], each changed after its text; more with a strength near 1.

        Raises UserError as `applications.text_to_image.edit` does, which also tells how many steps run.
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
        """Images [n, H, W, C] painted after their texts where masks [n, H, W] are True."""
        model = self._of_texts(images, prompts)
        w = self.usual_w if w is None else w
        if masks.dtype != bool or masks.shape != images.shape[:-1]:
            raise UserError(
                f"masks are {masks.dtype} {list(masks.shape)}: give bool {list(images.shape[:-1])}, True "
                f"where to paint"
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
        """The noise [n, *data_shape] that images [n, H, W, C] of these classes come from.

        By an encoder student, or by the teacher or stage one in many steps. request: num_steps,
        batch_size.
        """
        if self.prompted is not None:
            raise UserError("a model of texts doesn't encode: choose a model of classes")
        values = self.space.to_latents(images) if self.space else images
        if values.shape[1:] != self.about.data_shape or len(values) != len(labels):
            raise UserError(
                f"there are images {list(np.shape(images))} and {len(labels)} labels: give as many, of "
                f"the size that the model makes"
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
                "this model is conditioned on classes: editing and in-painting need texts"
            )
        expected = (len(prompts), *self.prompted.image_shape)
        if images.shape != expected:
            raise UserError(
                f"images are {list(images.shape)}: give one for each text, {list(expected)} in all"
            )
        return self.prompted
