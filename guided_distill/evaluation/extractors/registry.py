"""Extractors by name."""

from etils import epath

from guided_distill.config import EXTRACTORS
from guided_distill.data.source import Source
from guided_distill.errors import UserError
from guided_distill.evaluation.extractors.classifier import train_extractor
from guided_distill.evaluation.extractors.clip import clip_extractor
from guided_distill.evaluation.extractors.extractor import Extractor
from guided_distill.evaluation.extractors.inception import inception_extractor
from guided_distill.evaluation.extractors.lite0 import lite0_extractor


def load_extractor(name: str, source: Source, workdir: epath.Path) -> Extractor:
    """Load the extractor of a name (config.EXTRACTORS) for a run's training data.

    Raises UserError if the name is unknown, if the data don't suit the extractor, or if its weights are
    missing or invalid.
    """
    kind, _, path = name.partition(":")
    if name == "classifier":
        return train_extractor(source, workdir / "classifier")
    if kind == "lite0":
        return lite0_extractor(source.shape, path or None)
    if kind == "inception":
        return inception_extractor(source.shape, path)
    if kind == "clip":
        return clip_extractor(source.shape, path)
    raise UserError(f"unknown extractor {name!r}: choose one of {', '.join(EXTRACTORS)}")
