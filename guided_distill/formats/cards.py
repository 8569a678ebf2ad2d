"""The README.md of an exported folder, from a template beside this file."""

from typing import Any

import jinja2


def rendered(template: str, **values: Any) -> str:
    """The text of the template `template`.md.jinja; an error of jinja2 if it names another value."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("guided_distill.formats", ""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(f"{template}.md.jinja").render(**values)
