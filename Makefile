# make demo: install into .venv and train a small model.  make test: the whole CPU test suite.
# Needs Python 3.11 or newer, git and make; no compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install format check test demo clean

help:
	@echo "make demo    install and train a small hybrid on this machine (about 7 minutes)"
	@echo "make test    the whole CPU test suite"
	@echo "make check   formatting, lint, types, import floors"
	@echo "make format  apply the formatting"
	@echo "make clean   remove the virtual environment and the caches"

# The stamp is written last: an install that was broken off begins anew.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("plait needs Python 3.11 or newer, this is " + sys.version.split()[0] \
	    if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,plots]"
	@touch $@

install: $(STAMP)

format: $(STAMP)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

check: $(STAMP)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_import_floors.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m "not gpu" $(PYTEST_ARGS)

demo: $(STAMP)
	$(BIN)/plait demo

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
