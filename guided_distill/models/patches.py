"""Squares of pixels moved into channels, so that a network sees an image at a coarser resolution."""

import jax


def to_patches(image: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] -> [B, H/size, W/size, size size C]; each square's pixels are in row-major order."""
    batch, height, width, channels = image.shape
    grid = image.reshape(batch, height // size, size, width // size, size, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // size, width // size, -1)


def from_patches(patches: jax.Array, size: int) -> jax.Array:
    """The inverse of to_patches: [B, h, w, size size C] -> [B, h size, w size, C]."""
    batch, rows, columns, _ = patches.shape
    grid = patches.reshape(batch, rows, columns, size, size, -1)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * size, columns * size, -1)
