"""Helpers that build pages: templates, and pictures and numbers as HTML."""

import base64
from typing import Any

import jinja2
from PIL import Image

from guided_distill.pictures import png
from guided_distill.plotting import Figure

DPI = 150


def render(template: str, **values: Any) -> str:
    """Return the text of a page; values are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("guided_distill.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(template).render(**values)


def data_url(picture: Image.Image | Figure) -> str:
    """The picture as a data URL, so that a page is a single file."""
    return f"data:image/png;base64,{base64.b64encode(png(picture, dpi=DPI)).decode()}"


def cell(value: Any) -> str:
    """A value as the text of a table's cell; None is empty."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
