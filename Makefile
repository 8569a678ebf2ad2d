# Each target creates the virtual environment with the locked dependencies if it is missing.
# To use another Python: make test PYTHON=python3.13 VENV=.venv313

PYTHON ?= python3
VENV ?= .venv
# What is installed in it to run the package, and to test it.
LOCK ?= requirements.lock
TEST_LOCK ?= requirements-dev.lock
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_TO_TEST := $(VENV)/.installed-to-test
INSTALLED_TO_DOCUMENT := $(VENV)/.installed-to-document
RUN := runs/digits
PYTEST := -m pytest -n auto --dist loadfile --no-loadscope-reorder
COMPILE := uv pip compile --universal --no-header --no-annotate --no-emit-index-url --upgrade

.PHONY: demo test lint colab parity docs notebooks dist lock

# Train and evaluate on the built-in digits, and write a report.
demo: $(INSTALLED)
	$(BIN)/guided-distill train --config configs/digits.py --workdir $(RUN)
	$(BIN)/guided-distill evaluate --workdir $(RUN)
	$(BIN)/guided-distill report --workdir $(RUN)

test: lint
	$(BIN)/python $(PYTEST)

lint: $(INSTALLED_TO_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Test with the versions that Colab has installed. They need Python 3.13. Types are checked with the newer ones only.
colab:
	$(MAKE) $(VENV)-colab/.installed VENV=$(VENV)-colab LOCK=requirements-colab.lock TEST_LOCK=requirements-colab.lock
	$(VENV)-colab/bin/python $(PYTEST)

# Compare with torch, diffusers and transformers, which the other environments lack.
parity:
	$(MAKE) $(VENV)-parity/.installed VENV=$(VENV)-parity LOCK=requirements-parity.lock TEST_LOCK=requirements-parity.lock
	$(VENV)-parity/bin/python -m pytest tests/parity

# Build the website from docs/ into site/.
docs: $(INSTALLED_TO_DOCUMENT)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file docs/site/mkdocs.yml

# Run the notebooks and save their outputs in .ipynb files.
notebooks: $(INSTALLED_TO_TEST)
	$(BIN)/python notebooks/execute.py notebooks/[0-9]*.py

# Build the sdist and the wheel into dist/, and check them as PyPI does.
dist: $(INSTALLED_TO_TEST)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check twine
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

$(INSTALLED): pyproject.toml $(LOCK)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "guided_distill needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(TEST_LOCK) --editable '.[report,text]'
	touch $@

$(INSTALLED_TO_TEST): $(INSTALLED) $(TEST_LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(TEST_LOCK)
	touch $@

$(INSTALLED_TO_DOCUMENT): $(INSTALLED) docs/site/requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r docs/site/requirements.lock
	touch $@

# Resolve the newest dependencies for all supported Pythons at once. Those of the tests come first because
# they constrain the others. The lock for Colab keeps what its image has installed.
lock:
	$(COMPILE) --python-version 3.11 --extra dev --output-file requirements-dev.lock pyproject.toml
	$(COMPILE) --python-version 3.11 --constraint requirements-dev.lock --output-file requirements.lock pyproject.toml
	$(COMPILE) --python-version 3.11 --extra docs --constraint requirements-dev.lock --output-file docs/site/requirements.lock pyproject.toml
	$(COMPILE) --python-version 3.13 --extra dev --constraint constraints-colab.txt --output-file requirements-colab.lock pyproject.toml
	# Without the CUDA libraries, which only PyPI's build of torch needs, and pins itself.
	$(COMPILE) --python-version 3.11 --extra dev --extra parity --constraint requirements-dev.lock pyproject.toml \
		| grep -vE '^(cuda|nvidia|triton)' >requirements-parity.lock
