"""Classes: as a condition, as a user names them, in turn."""

from collections.abc import Sequence

import numpy as np

from guided_distill.diffusion.guidance import Condition
from guided_distill.errors import UserError
from guided_distill.files import warn_once
from guided_distill.runs.trained import Description


def of_labels(labels: Sequence[int] | np.ndarray) -> Condition:
    """The condition of classes [n]."""
    return {"label": np.asarray(labels, np.int32)}


def class_index(label: int | str, about: Description, *, flag: str) -> int:
    """The place of a class that a user names: a number is the place itself, a string is a name.

    Names of folders are sorted as text, so the place of the class "2" may be another than 2, of which a
    warning says. Raises UserError, naming the flag, if there is no such class.
    """
    names = about.class_names
    if isinstance(label, str):
        place = names.index(label) if label in names else -1
    else:
        place = int(label) if isinstance(label, int | np.integer) else -1
        if str(place) in names and names.index(str(place)) != place < len(names):
            warn_once(
                f"{flag}: class {place} is the one named {names[place]!r}, and the one named '{place}' "
                f"is class {names.index(str(place))}"
            )
    if not 0 <= place < len(names):
        raise UserError(
            f"{flag} is {label!r}; give a number in 0 ... {len(names) - 1}, or one of "
            f"{', '.join(names[:10])}{' ...' if len(names) > 10 else ''}"
        )
    return place


def cycling_labels(count: int, num_classes: int) -> np.ndarray:
    """Labels [count] that go through the classes in turn."""
    return np.arange(count, dtype=np.int32) % num_classes
