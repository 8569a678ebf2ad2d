"""Alignment of samples with the captions that they were drawn for."""

from collections.abc import Callable, Sequence

import numpy as np

from guided_distill.data.source import Source
from guided_distill.errors import UserError
from guided_distill.evaluation.extractors.clip import ClipExtractor
from guided_distill.evaluation.extractors.extractor import Extractor
from guided_distill.evaluation.metrics.alignment import Alignment, CaptionGuess, retrieval
from guided_distill.text.encoder import SentenceEncoder, TextEncoder

MAX_EXAMPLES = 10_000
"""The maximum number of training images that the regression is fitted on."""

Align = Callable[..., Alignment]
"""f(features [n, D] of samples, captions [n]), where the captions are texts of the test split."""


def captions_of(source: Source) -> np.ndarray:
    """The caption of each example. Raises UserError if the source has no captions."""
    if source.captions is None:
        raise UserError(
            f"{source.name} has no captions, which a text-conditioned run needs: choose data with "
            f"captions"
        )
    return np.asarray(source.captions)


def caption_alignment(
    train: Source, test: Source, extractor: Extractor, encoder: TextEncoder
) -> Align | None:
    """The measure of alignment that suits the extractor, or None.

    With CLIP's features it is the CLIP score: the mean cosine between a sample and the caption that it
    was drawn for (some papers multiply it by 100). With Lite0's features and a sentence encoder it is a
    regression fitted on `train`. Retrieval searches all captions of `test`.

    Raises UserError if the data have no captions.
    """
    if isinstance(extractor, ClipExtractor):
        return against(captions_of(test), extractor.embed_texts, retrieval)
    if isinstance(encoder, SentenceEncoder) and extractor.name.startswith("lite0"):
        return against(captions_of(test), encoder.embed, _fitted(train, extractor, encoder).align)
    return None


def against(
    captions: np.ndarray,
    embed: Callable[[Sequence[str]], np.ndarray],
    align: Callable[..., Alignment],
) -> Align:
    """The measure that compares samples with the distinct texts in `captions`, embedded once.

    align: f(features [n, D], embeddings [M, E], indices [n] in [0, M)).
    """
    choices = np.unique(captions)
    embeddings = embed(choices.tolist())
    return lambda features, captions: align(
        features, embeddings, np.searchsorted(choices, captions)
    )


def _fitted(train: Source, extractor: Extractor, encoder: SentenceEncoder) -> CaptionGuess:
    """The regression, fitted on up to MAX_EXAMPLES training images and their captions."""
    chosen = np.sort(np.random.default_rng(0).permutation(train.size)[:MAX_EXAMPLES])
    features = np.concatenate(
        [extractor(examples["image"])[0] for examples in train.chunks_of(chosen)]
    )
    texts, text_of = np.unique(captions_of(train)[chosen], return_inverse=True)
    return CaptionGuess.fit(features, encoder.embed(texts.tolist())[text_of])
