"""What the samples of an evaluation are of: the classes in turn, or the captions of the test split."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from etils import epath

from guided_distill.data.source import Source
from guided_distill.diffusion.guidance import Condition
from guided_distill.errors import UserError
from guided_distill.latent_space import load_latent_space
from guided_distill.sampling import cycling_labels, of_labels
from guided_distill.text.encoder import TextEncoder


@dataclass(frozen=True)
class Subjects:
    """Of n samples: the condition [n, ...], what stands for none, and the classes [n] to find in them.

    captions: the texts [n] that they are of, where they are of texts.
    """

    condition: Condition
    null: Condition | None
    labels: np.ndarray
    captions: np.ndarray | None


def subjects(test: Source, count: int, encoder: TextEncoder | None) -> Subjects:
    """`count` of them. With a text encoder, the captions of the test split are gone through in turn."""
    if encoder is None:
        labels = cycling_labels(count, test.num_classes)
        return Subjects(of_labels(labels), None, labels, None)
    chosen = np.arange(count) % test.size
    captions = captions_of(test)[chosen]
    texts, text_of = np.unique(captions, return_inverse=True)
    states = encoder.encode(["", *texts.tolist()])
    return Subjects(
        condition={"text": states[1:][text_of]},
        null={"text": states[0]},
        labels=test.read(chosen)["label"],
        captions=captions,
    )


def captions_of(source: Source) -> np.ndarray:
    """A text for each example. Raises UserError if the source has none."""
    if source.captions is None:
        raise UserError(f"{source.name} has no captions: a run of texts needs data that have them")
    return np.asarray(source.captions)


def pixels_of(*, latent: bool, workdir: epath.Path) -> Callable[[np.ndarray], np.ndarray]:
    """From samples [n, ...] to what is looked at: images, where samples are latents."""
    return load_latent_space(workdir).to_images if latent else lambda samples: samples
