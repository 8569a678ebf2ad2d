"""Notebooks: the committed ones match their sources and contain outputs, and every one runs."""

import importlib.metadata
import json
import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from execute import VARIANT, execute, read
from IPython.core.inputtransformer2 import TransformerManager
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


def first_cell(source):
    return next(cell.source for cell in read(source).cells if cell.cell_type == "code")


def test_all_start_with_the_same_cell():
    assert len({first_cell(source) for source in SOURCES}) == 1


@pytest.fixture
def without_the_package(monkeypatch):
    """f(succeeds): run the first cell where the package is missing; return what it installs with pip."""
    monkeypatch.delenv("GUIDED_DISTILL_SOURCE", raising=False)
    monkeypatch.setenv("PATH", "/bin")  # Restored after the cell has changed it.

    def run(*, succeeds=True):
        installed = []

        def version(name):
            if installed and succeeds:
                return "1.0"
            raise importlib.metadata.PackageNotFoundError(name)

        class Shell:
            def run_line_magic(self, magic, line):
                assert (magic, line) == ("pip", 'install --quiet "{source}"')
                installed.append(namespace["source"])

        monkeypatch.setattr(importlib.metadata, "version", version)
        namespace = {"get_ipython": Shell}
        exec(TransformerManager().transform_cell(first_cell(SOURCES[0])), namespace)
        return installed

    return run


def test_the_first_cell_installs_the_clone_around_the_notebook(without_the_package, monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    assert without_the_package() == [f"{ROOT}[report,text]"]


def test_the_first_cell_installs_from_pypi_outside_a_clone(
    without_the_package, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert without_the_package() == ["guided_distill[report,text]"]


def test_the_first_cell_installs_what_the_variable_names(without_the_package, monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setenv("GUIDED_DISTILL_SOURCE", "a.whl[report,text]")
    assert without_the_package() == ["a.whl[report,text]"]


def test_the_first_cell_fails_if_the_installation_failed(without_the_package):
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        without_the_package(succeeds=False)


@every_notebook
def test_it_runs(source, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # Its weights would have to be downloaded; any with the width that the emoji teacher expects will do.
    write_minilm(tmp_path / "data" / "minilm", hidden_size=384)
    notebook = read(source)
    assert sum(VARIANT in cell.source for cell in notebook.cells) == 1
    execute(notebook, tmp_path, variant="runlocal", timeout=400)
