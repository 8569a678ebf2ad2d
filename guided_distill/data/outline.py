"""Outlines of data: the shapes and classes that a network or a plan needs, without the data."""

from typing import Any

from guided_distill.config import Data
from guided_distill.data.source import Source
from guided_distill.errors import UserError
from guided_distill.models.outline import Outline


def outline_of(source: Source) -> Outline:
    """The outline of an opened source."""
    return Outline(source.shape, source.num_classes, source.condition_shapes, source.latent)


def expected_outline(data: Data) -> Outline | None:
    """The outline in config.data.shape and config.data.condition, for data that need not exist."""
    if not data.shape:
        return None
    condition = dict(data.condition)
    num_classes = condition.get("label", 0)
    shapes = {name: () if name == "label" else tuple(each) for name, each in condition.items()}
    return Outline(data.shape, num_classes, shapes, data.name.startswith("encoded:"))


def check_expected(data: Data, source: Source) -> None:
    """Raises UserError unless the data have the shape and the condition of their config."""
    expected, found = expected_outline(data), outline_of(source)
    if expected is None:
        return
    pairs: list[tuple[str, Any, Any]] = [("shape", expected.shape, found.shape)]
    pairs.append(("condition", _condition(expected), _condition(found)))
    for key, wanted, actual in pairs:
        if wanted != actual:
            raise UserError(
                f"config.data.{key} is {wanted}, but the {key} of {data.name} is {actual}: give the data "
                f"that the config is for, or change the key"
            )


def _condition(outline: Outline) -> dict[str, Any]:
    return {
        name: outline.num_classes if name == "label" else tuple(shape)
        for name, shape in sorted(outline.condition_shapes.items())
    }
