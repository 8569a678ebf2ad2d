"""What both sides of the U-Net's parity test share: sizes, inputs and weights."""

import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "unet_golden.npz"
# From 128 channels on, our normalization has 32 groups, whatever the channels.
GROUPS = 32
WIDTH = 128
EMBEDDING = 4 * WIDTH
HEAD_WIDTH = 64
CLASSES = 3
RESIDUAL_BLOCKS = {
    "plain": (WIDTH, None),
    "wider": (2 * WIDTH, None),
    "down": (WIDTH, "down"),
    "up": (WIDTH, "up"),
}
"""Output channels and resampling of each; the input has WIDTH channels."""


def normal(name: str, *shape: int) -> np.ndarray:
    """Standard normal numbers that depend on the name alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(shape, np.float32)


def weight(name: str, *shape: int) -> np.ndarray:
    """The weight of that name in our layout, a Flax path; scales lie around one."""
    return 0.05 * normal(name, *shape) + np.float32(name.endswith("/scale"))


IMAGE = normal("image", 2, 8, 8, 3)
FEATURES = normal("features", 2, 8, 8, WIDTH)
CONDITION = normal("condition", 2, EMBEDDING)
TIME = np.array([0.3, 0.8], np.float32)
"""arctan(sigma/alpha) / (pi/2), the network's own time."""
LABEL = np.array([1, CLASSES])
W = np.array([0.5, 3.0], np.float32)


def probe(output: np.ndarray) -> np.ndarray:
    """128 values of an output [B, H, W, C] or [B, D], at fixed places."""
    return np.random.default_rng(0).permutation(output.ravel())[:128].astype(np.float32)
