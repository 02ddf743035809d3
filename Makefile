# make test: sets up an environment and runs lint and tests.    make demo: sets up and runs the demonstration.
# PYTHON picks the interpreter; CONSTRAINTS= installs without the versions pinned for machines without a GPU.

PYTHON ?= python3
CONSTRAINTS ?= constraints-cpu.txt
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: test lint format demo bench clean

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(VENV)/installed
	$(BIN)/python examples/train_idformer.py

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.id_former
	$(BIN)/python -m benchmarks.cross_attention
	$(BIN)/python -m benchmarks.resampler_designs
	$(BIN)/python -m benchmarks.inner_adaptor

# torch by itself first: with it in place no other package pulls in a CUDA build.
$(VENV)/installed: pyproject.toml setup.py constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .ruff_cache .hypothesis
