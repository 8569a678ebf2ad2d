"""Notebooks: the committed ones match their sources and contain outputs, and every one runs."""

import json
import os
import re
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from execute import VARIANT, execute, read
from text_models import write_minilm

ROOT = Path(__file__).parents[1]

SOURCES = sorted(ROOT.glob("notebooks/[0-9]*.py"))
LARGEST = 600_000
MACHINE_PATH = re.compile(r"/(tmp|work|root|home|Users|usr|opt)/")

every_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


@every_notebook
def test_what_is_kept_is_what_the_source_says(source):
    kept = jupytext.read(source.with_suffix(".ipynb"))
    assert [(cell.cell_type, cell.source) for cell in kept.cells] == [
        (cell.cell_type, cell.source) for cell in read(source).cells
    ]


@every_notebook
def test_what_is_kept_shows_pictures_and_no_machine(source):
    kept = source.with_suffix(".ipynb")
    notebook = jupytext.read(kept)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert kinds & {"image/png", "image/gif"}
    assert all(output.output_type != "error" for output in outputs)
    texts = {kind for kind in kinds if not kind.startswith("image/")}
    said = [
        *(cell.source for cell in notebook.cells),
        *(output.get("text", "") for output in outputs),
        *(
            json.dumps(output["data"].get(kind, ""))
            for output in outputs
            for kind in texts
            if "data" in output
        ),
    ]
    assert not [text for text in said if MACHINE_PATH.search(text)]
    assert kept.stat().st_size < LARGEST


@every_notebook
def test_it_runs(source, tmp_path, monkeypatch):
    # The kernel and the commands that it runs are those of the tests' environment.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # Its weights would have to be downloaded; any with the width that the emoji teacher expects will do.
    write_minilm(tmp_path / "data" / "minilm", hidden_size=384)
    notebook = read(source)
    assert sum(VARIANT in cell.source for cell in notebook.cells) == 1
    execute(notebook, tmp_path, variant="runlocal", timeout=400)
