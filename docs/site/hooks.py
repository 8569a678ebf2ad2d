"""Pages of the site that lie outside of docs/, such as the README, which is its home page."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "launch/README.md": "launch/README.md",
}


def page_of(source):
    """Its text with links that work on the site; notebooks, which it lacks, become plain names."""
    text = (ROOT / source).read_text().replace("](docs/", "](")
    for outside, page in OUTSIDE.items():
        text = text.replace(f"]({outside}", f"]({page}")
    return re.sub(r"\[(\w+)\]\(notebooks/\S+?\)", r"`\1`", text)


def on_files(files, config):
    """Add them."""
    # Here, so that the tests, whose environment has no mkdocs, can read the pages.
    from mkdocs.structure.files import File

    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=page_of(source)))
    return files


def on_page_markdown(markdown, **_):
    """Turn links from docs/ to them into links beside them."""
    for source, page in OUTSIDE.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    return markdown
