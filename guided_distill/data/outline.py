"""What data are like, without the data: all that a network, or a plan, needs to know of them."""

from typing import Any

from guided_distill.config import Data
from guided_distill.data.source import Source
from guided_distill.errors import UserError
from guided_distill.models.outline import Outline


def outline_of(source: Source) -> Outline:
    """That of data which are there."""
    return Outline(source.shape, source.num_classes, source.condition_shapes, source.latent)


def expected_outline(data: Data) -> Outline | None:
    """What config.data.shape and config.data.condition say of data that need not be there."""
    if not data.shape:
        return None
    condition = dict(data.condition)
    num_classes = condition.get("label", 0)
    shapes = {name: () if name == "label" else tuple(each) for name, each in condition.items()}
    return Outline(data.shape, num_classes, shapes, data.name.startswith("encoded:"))


def check_expected(data: Data, source: Source) -> None:
    """Raises UserError unless the data are what their config says."""
    expected, found = expected_outline(data), outline_of(source)
    if expected is None:
        return
    said: list[tuple[str, Any, Any]] = [("shape", expected.shape, found.shape)]
    said.append(("condition", _condition(expected), _condition(found)))
    for key, wanted, there in said:
        if wanted != there:
            raise UserError(
                f"config.data.{key} is {wanted}, but that of {data.name} is {there}: give the data that "
                f"the config is for, or change it"
            )


def _condition(outline: Outline) -> dict[str, Any]:
    return {
        name: outline.num_classes if name == "label" else tuple(shape)
        for name, shape in sorted(outline.condition_shapes.items())
    }
