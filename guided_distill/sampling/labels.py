"""Class labels: conditions from labels, labels from names, and labels in turn."""

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
    """The index of a class that a user gives: a number is the index itself, a string is a name.

    Names of folders are sorted as text, so the index of the class "2" may differ from 2; a warning says
    so. Raises UserError, naming the flag, if there is no such class.
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
    """Labels [count] that cycle through the classes."""
    return np.arange(count, dtype=np.int32) % num_classes
