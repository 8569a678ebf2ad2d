"""Labels and names of classes: the checks that sources of files share."""

from collections.abc import Iterable, Sequence

import numpy as np

from guided_distill.errors import UserError
from guided_distill.files import warn_once

MAX_CLASSES = 100_000
"""Labels must be below this; numbers from here on probably don't number classes."""


def checked_labels(labels: np.ndarray, count: int, *, where: str) -> np.ndarray:
    """The labels as int32 [count]. where: their file and name, for errors.

    Raises UserError unless they are integers [count] in [0, MAX_CLASSES).
    """
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise UserError(
            f"{where} must be non-negative integers [{count}]; it is {labels.dtype} "
            f"{list(labels.shape)}"
        )
    if (largest := int(labels.max(initial=0))) >= MAX_CLASSES:
        raise UserError(
            f"{where} goes up to {largest}, but labels are class numbers below {MAX_CLASSES}: number "
            f"the classes from 0"
        )
    return labels.astype(np.int32)


def names_of_classes(
    given: Sequence[str] | None, labels: Iterable[np.ndarray], *, path: str
) -> list[str]:
    """The name of each class in the labels of all splits: `given`, or their numbers.

    A class without images causes a warning. Raises UserError if a class has no name.
    """
    counts = np.bincount(np.concatenate(list(labels)), minlength=1)
    names = [str(label) for label in range(len(counts))] if given is None else list(given)
    if not len(counts) <= len(names) <= MAX_CLASSES:
        raise UserError(
            f"{path}: class_names has {len(names)} names, but labels go up to {len(counts) - 1}: name "
            f"every class"
        )
    empty = [*np.flatnonzero(counts == 0), *range(len(counts), len(names))]
    if empty and counts.sum():
        some = ", ".join(f"{label} {names[label]!r}" for label in empty[:5])
        warn_once(
            f"{path}: {len(empty)} of {len(names)} classes have no image ({some}), but will be sampled: "
            f"number the classes from 0 without gaps, and name no others"
        )
    return names
