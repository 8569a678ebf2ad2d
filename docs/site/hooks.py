"""Pages of the site that lie outside of docs/, such as the README, which is its home page."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "launch/README.md": "launch/README.md",
}


def on_files(files, config):
    """Add them, with their links into docs/ as links beside them."""
    for source, page in OUTSIDE.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, **_):
    """Turn links from docs/ to them into links beside them."""
    for source, page in OUTSIDE.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    return markdown
