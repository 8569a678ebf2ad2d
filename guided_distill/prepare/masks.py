"""Random masks for training in-painting."""

import numpy as np

WHOLE = 0.25
"""The fraction of masks that hide the whole image, so that the model also learns to paint all of it."""

MOST_BOXES = 4


def random_mask(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draws a bool mask [height, width], True where to paint: everywhere, or in up to MOST_BOXES boxes.

    A box's sides are a tenth to two thirds of the image's. The paper uses Stable Diffusion's in-painting
    model, whose training masks were never fully published; these masks are this project's own.
    """
    mask = np.zeros((height, width), bool)
    if rng.random() < WHOLE:
        return ~mask
    for _ in range(rng.integers(1, MOST_BOXES + 1)):
        rows, columns = (max(1, int(side * rng.uniform(0.1, 2 / 3))) for side in (height, width))
        top, left = rng.integers(0, height - rows + 1), rng.integers(0, width - columns + 1)
        mask[top : top + rows, left : left + columns] = True
    return mask
