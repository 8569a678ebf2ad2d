"""The same numbers for a test and for the other implementation that it is compared with."""

import zlib
from collections.abc import Mapping

import numpy as np


def random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights that keep activations of order 1 through many layers, each set by its name alone."""
    return {name: _tensor(name, shape) for name, shape in shapes.items()}


def _tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
        values = rng.uniform(0.5, 1.5, shape)
    elif name.endswith("weight"):
        values = rng.standard_normal(shape, np.float32) * (2 / np.prod(shape[1:])) ** 0.5
    else:
        values = 0.1 * rng.standard_normal(shape)
    return values.astype(np.float32)


def random_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(0, 256, shape, np.uint8)


def spots(array: np.ndarray, count: int = 8) -> np.ndarray:
    """A few elements of an array [B, H, W, C] or [B, C], spread over it."""
    flat = np.asarray(array).ravel()
    return flat[np.random.default_rng(flat.size).integers(0, flat.size, count)]
