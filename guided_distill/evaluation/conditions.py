"""What the samples of an evaluation are of: the classes in turn, or the captions of the test split."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from etils import epath

from guided_distill.data.source import Source
from guided_distill.diffusion.guidance import Condition
from guided_distill.interop.companions import COMPANIONS
from guided_distill.latent_space import load_latent_space
from guided_distill.sampling import cycling_labels, of_labels
from guided_distill.text.registry import load_text_encoder


@dataclass(frozen=True)
class Subjects:
    """Of n samples: the condition [n, ...], what stands for none, and the classes [n] to find in them."""

    condition: Condition
    null: Condition | None
    labels: np.ndarray


def subjects(
    test: Source, count: int, *, text_encoder: str | None, workdir: epath.Path
) -> Subjects:
    """`count` of them. With a text encoder, the captions of the test split are gone through in turn."""
    if text_encoder is None:
        labels = cycling_labels(count, test.num_classes)
        return Subjects(of_labels(labels), None, labels)
    assert test.captions is not None
    chosen = np.arange(count) % test.size
    texts, text_of = np.unique(np.asarray(test.captions)[chosen], return_inverse=True)
    encoder = load_text_encoder(f"companions:{workdir / COMPANIONS}")
    states = encoder.encode(["", *map(str, texts)])
    return Subjects(
        condition={"text": states[1:][text_of]},
        null={"text": states[0]},
        labels=test.read(chosen)["label"],
    )


def pixels_of(*, latent: bool, workdir: epath.Path) -> Callable[[np.ndarray], np.ndarray]:
    """From samples [n, ...] to what is looked at: images, where samples are latents."""
    return load_latent_space(workdir).to_images if latent else lambda samples: samples
