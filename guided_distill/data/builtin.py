"""Sources that come with the package: handwritten digits and the 2-D mixture."""

import functools
import importlib.resources

import jax
import jax.numpy as jnp
import numpy as np

from guided_distill import draws
from guided_distill.data.mixture import DEFAULT_MIXTURE
from guided_distill.data.source import SPLITS, Source, from_arrays, split_indices

_MIXTURE_SIZE = {"train": 50_000, "test": 10_000}


def digits(split: str) -> Source:
    """Opens 1,797 handwritten digits, 8x8x1, in the package; a fifth of each class is the test split.

    They are the test set of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI
    Machine Learning Repository, 1998 (doi:10.24432/C50P49, CC BY 4.0), as scikit-learn has them too.
    """
    images, labels = _digits()
    indices = split_indices(labels, split=split, test_fraction=0.2)
    return from_arrays(
        "digits",
        split=split,
        images=images[indices],
        labels=labels[indices],
        class_names=[str(digit) for digit in range(10)],
    )


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    with (importlib.resources.files(__package__) / "digits.npz").open("rb") as file:
        fields = np.load(file)
        images, labels = fields["images"], fields["labels"]
    return (images[..., None] / 8 - 1).astype(np.float32), labels.astype(np.int64)


def mixture2d(split: str, *, seed: int) -> Source:
    """Opens points [2] of `DEFAULT_MIXTURE`, drawn once from the seed, equally many of every class."""
    labels = np.arange(_MIXTURE_SIZE[split]) % DEFAULT_MIXTURE.num_classes
    key = jax.random.fold_in(draws.key_of(seed), SPLITS.index(split))
    return from_arrays(
        "mixture2d",
        split=split,
        images=np.asarray(DEFAULT_MIXTURE.sample(key, jnp.asarray(labels))),
        labels=labels,
        class_names=[f"arm {arm}" for arm in range(DEFAULT_MIXTURE.num_classes)],
    )
