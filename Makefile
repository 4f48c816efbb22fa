# Two commands for a newcomer; both make their own environment in .venv first.
#
#   make simulate    three simulated hospitals, a private federated study, a signed release in runs/demo
#   make test        format, lint, types, import contracts and tests

PYTHON ?= python3
OUT ?= runs/demo
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

# Flower reports use and looks for updates unless told otherwise before it is imported.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help simulate test lint clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   make/make/p' Makefile

simulate: $(VENV)/.simulations
	$(BIN)/fedsynth simulate --out $(OUT)

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# The stamps: an environment is brought up to date when what it is made from has changed.
$(VENV)/.simulations: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing fedsynth into $(VENV) (a few minutes the first time) ..."
	$(PIP) -c constraints.txt -e '.[simulations]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing fedsynth and its development tools into $(VENV) (a few minutes the first time) ..."
	$(PIP) -c constraints.txt -e '.[simulations,dev]' hatchling
	@touch $@ $(VENV)/.simulations

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "There is no '$(PYTHON)'. Install Python 3.11 or 3.12, or name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || { \
	  echo "fedsynth needs Python 3.11 or 3.12; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
