# make test: sets up an environment and runs lint and tests.    make demo: sets up and runs the demonstration.
# PYTHON picks the interpreter; CONSTRAINTS= installs without the versions pinned for machines without a GPU.

PYTHON ?= python3
CONSTRAINTS ?= constraints-cpu.txt
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: test lint format demo bench gpu clean

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

# All that is to be known of the attention kernels on a CUDA GPU, in PYTHON's own environment: are they right, which
# tiles are fastest, how fast, do models train alike, is memory accessed properly (compute-sanitizer, of CUDA's toolkit).
WIDTHS ?= 64 128
gpu:
	$(PYTHON) -m pytest tests/test_triton_attention.py tests/test_attention_kernels.py
	$(foreach width,$(WIDTHS),$(PYTHON) -m benchmarks.tune_attention --head-dim $(width) --dtype bfloat16 &&) true
	$(PYTHON) -m benchmarks.cross_attention --device cuda --dtype bfloat16
	$(PYTHON) -m benchmarks.loss_curves --bf16
	compute-sanitizer $(PYTHON) -m pytest tests/test_triton_attention.py -k widths

# torch by itself first: with it in place no other package pulls in a CUDA build.
$(VENV)/installed: pyproject.toml setup.py constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .ruff_cache .hypothesis
