# Each target does all its own set-up: a virtual environment of its own with the locked dependencies.
# Another Python: make test PYTHON=python3.13 VENV=.venv313

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_TO_TEST := $(VENV)/.installed-to-test
RUN := runs/digits
COMPILE := uv pip compile --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url --upgrade

.PHONY: demo test lint lock notebooks

# The main job on the built-in digits: train, evaluate, and a page to look at.
demo: $(INSTALLED)
	$(BIN)/guided-distill train --config configs/digits.py --workdir $(RUN)
	$(BIN)/guided-distill evaluate --workdir $(RUN)
	$(BIN)/guided-distill report --workdir $(RUN)

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(INSTALLED_TO_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "guided_distill needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(INSTALLED_TO_TEST): $(INSTALLED) requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	touch $@

# Run the notebooks, and keep what they show in their .ipynb files.
notebooks: $(INSTALLED_TO_TEST)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python notebooks/execute.py notebooks/[0-9]*.py

# Resolve the newest dependencies for all supported Pythons at once.
lock:
	$(COMPILE) --output-file requirements.lock pyproject.toml
	$(COMPILE) --extra dev --constraint requirements.lock --output-file requirements-dev.lock pyproject.toml
