"""Execute notebooks: write NAME.ipynb, with outputs, from NAME.py in percent format.

python notebooks/execute.py notebooks/01_distill_digits.py
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext
from nbclient import NotebookClient

VARIANT = 'variant = ""'
WIDGET = "application/vnd.jupyter.widget-view+json"


def read(source: Path) -> Any:
    """Return the notebook of a .py file, without outputs."""
    notebook = jupytext.read(source)
    notebook.metadata = {
        "jupytext": {"formats": "ipynb,py:percent"},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index}"
        cell.metadata = {}
    return notebook


def execute(notebook: Any, folder: Path, *, variant: str = "", timeout: int = 1800) -> None:
    """Run every cell of a notebook in a folder, and store the outputs in the notebook.

    Raises an error if a cell raises one, or takes longer than `timeout` seconds.
    """
    for cell in notebook.cells:
        cell.source = cell.source.replace(VARIANT, f'variant = "{variant}"')
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute()
    # Without a kernel, a widget shows only an error message.
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [each for each in cell.outputs if WIDGET not in each.get("data", {})]
    notebook.metadata["language_info"] = {"name": "python"}


def main(sources: list[str]) -> None:
    """Run the sources in turn, in one new folder, and write each .ipynb beside its source."""
    with tempfile.TemporaryDirectory() as folder:
        for source in map(Path, sources):
            notebook, start = read(source), time.monotonic()
            execute(notebook, Path(folder))
            jupytext.write(notebook, source.with_suffix(".ipynb"))
            print(f"{source}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
