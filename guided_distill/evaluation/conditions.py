"""What the samples of an evaluation are of: the classes in turn, or the captions of the test split."""

from dataclasses import dataclass

import numpy as np

from guided_distill.config import Experiment
from guided_distill.data import sources
from guided_distill.data.encoded import read_about
from guided_distill.data.source import Source
from guided_distill.diffusion.guidance import Condition
from guided_distill.errors import UserError
from guided_distill.places import local_path_named
from guided_distill.sampling.labels import cycling_labels, of_labels
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
        labels=test.labels_of(chosen),
        captions=captions,
    )


def open_pixels(experiment: Experiment) -> tuple[Source, Source, bool]:
    """What a run is measured against: pixels to train and to test on, and whether it takes texts.

    Of encoded data they are those that were encoded. Raises UserError for an in-painting run.
    """
    data, of_texts = experiment.data, experiment.data.text_encoder is not None
    name, image_size = data.name, data.image_size
    if name.startswith("encoded:"):
        encoding = read_about(local_path_named(name.removeprefix("encoded:"), "encoded data"))
        name, image_size = encoding.data, encoding.image_size
        of_texts = encoding.text_shape is not None
        if encoding.inpaint:
            raise UserError("evaluate measures no in-painting: look at images of `inpaint`")
    train, test = (
        sources.load(name, split=split, image_size=image_size, seed=experiment.seed)
        for split in sources.SPLITS
    )
    return train, test, of_texts


def captions_of(source: Source) -> np.ndarray:
    """A text for each example. Raises UserError if the source has none."""
    if source.captions is None:
        raise UserError(f"{source.name} has no captions: a run of texts needs data that have them")
    return np.asarray(source.captions)
