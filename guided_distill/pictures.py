"""Draw samples: grids of images with Pillow, points in the plane with matplotlib."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from guided_distill.data.pixels import to_uint8

if TYPE_CHECKING:
    from guided_distill.plotting import Figure

GAP = 8
"""Pixels between the images of a grid."""

SIDE, WIDTH = 64, 1600


def image_grid(images: np.ndarray, *, columns: int, scale: int) -> Image.Image:
    """A grid of images [n, H, W, C] in [-1, 1], filled row by row, each pixel scale x scale."""
    pixels = to_uint8(images).repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = pixels.shape
    rows = -(-count // columns)
    canvas = np.full(
        (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), 255, np.uint8
    )
    for index, image in enumerate(pixels):
        top, left = (index // columns) * (height + GAP), (index % columns) * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas)


def point_plot(points: np.ndarray, labels: np.ndarray) -> Figure:
    """A plot of points [n, 2] in the plane, coloured by label [n]."""
    return point_plots(points[None], labels, size=4)


def point_plots(points: np.ndarray, labels: np.ndarray, *, size: float) -> Figure:
    """Plots of k sets of points [k, n, 2] side by side, `size` inches each, coloured by label [n]."""
    from guided_distill.plotting import Figure  # Slow to import, and not needed for images.

    figure = Figure(figsize=(size * len(points), size), layout="constrained")
    panels = figure.subplots(1, len(points), squeeze=False)[0]
    for axes, each in zip(panels, points, strict=True):
        axes.scatter(each[:, 0], each[:, 1], c=labels, s=6, cmap="tab10")
        axes.set(xlim=(-2, 2), ylim=(-2, 2), aspect="equal", xticks=[], yticks=[])
    return figure


def grid_or_plot(samples: np.ndarray, labels: np.ndarray, *, columns: int) -> Image.Image | Figure:
    """A grid of images [n, H, W, C], or a plot of points [n, 2].

    Small images are enlarged by a whole factor to at least SIDE pixels; a grid wider than WIDTH pixels
    is shrunk to it.
    """
    if samples.ndim == 2:
        return point_plot(samples, labels)
    grid = image_grid(samples, columns=columns, scale=-(-SIDE // samples.shape[1]))
    grid.thumbnail((WIDTH, grid.height))
    return grid


def png(
    picture: Image.Image | Figure, *, dpi: int = 130, information: PngInfo | None = None
) -> bytes:
    """The picture as a PNG file. dpi: for figures, whose sizes are in inches. information: for images."""
    data = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.save(data, "PNG", pnginfo=information)
    else:
        picture.savefig(data, format="png", dpi=dpi)
    return data.getvalue()
