"""Sources that need no files: handwritten digits and the 2-D mixture."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from guided_distill import draws
from guided_distill.data.mixture import DEFAULT_MIXTURE
from guided_distill.data.source import SPLITS, Source, from_arrays, split_indices

_MIXTURE_SIZE = {"train": 50_000, "test": 10_000}


def digits(split: str) -> Source:
    """Opens scikit-learn's 1,797 handwritten digits, 8x8x1; a fifth of each class is the test split."""
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
    # Imported here, because scikit-learn takes a second to load and only this source needs it.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images[..., None] / 8 - 1).astype(np.float32)
    return images, bunch.target


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
