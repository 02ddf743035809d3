# Targets create their environment in .venv on first use.
#
#   make test         lint, spelling and all tests
#   make test-oldest  all tests with the lowest supported versions of the dependencies, in .venv-oldest
#   make docs         the documentation site in site/; a warning is an error
#   make format       fix what ruff can fix
#   make demo         train the small example and write its report
#   make bench        CPU benchmarks
#   make fuzz         random inputs for an hour: records, images, texts, answers, configurations, predictions
#   make resume       kill training runs at random moments, resume them, and compare bit for bit; a few minutes
#   make data-build   build 20,000 synthetic records of VCR, with one and two workers and killed five times
#   make test-distributed  all models and kinds of batches under DDP, ZeRO and FSDP2, two processes; minutes
#   make gpu          tests and benchmarks of the attention kernels on a CUDA GPU, in the environment of PYTHON
#   make clean        remove environments, builds and caches
#
# PYTHON is the interpreter for new environments. CONSTRAINTS is a file of pinned versions; the default pins a CPU build
# of torch. On a machine with a GPU, pass CONSTRAINTS= to install the newest versions.

PYTHON ?= python3
CONSTRAINTS ?= constraints-cpu.txt
# The lowest supported torch is 2.11, which the GPU machines have. PyPI has CPU builds of few versions, so a machine
# without a GPU tests the lowest supported versions of everything else with the torch that is pinned for it.
OLDEST_TORCH ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
PIP_INSTALL := -m pip install -q --disable-pip-version-check
PIP := $(BIN)/python $(PIP_INSTALL) $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
PROSE := README.md CONTRIBUTING.md CHANGELOG.md docs

.PHONY: test test-oldest test-distributed lint docs format demo bench fuzz resume data-build gpu clean

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell $(PROSE)

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

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
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.packing

KILLS ?= 20
# IDAVLM_FUZZ multiplies the number of examples of continuous integration.
fuzz: $(VENV)/installed
	IDAVLM_FUZZ=60 $(BIN)/python -m pytest tests/fuzz

resume: $(VENV)/installed
	OMP_NUM_THREADS=1 nice $(BIN)/python -m tests.killed_runs --kills $(KILLS)

RECORDS ?= 20000
data-build: $(VENV)/installed
	nice $(BIN)/python -m benchmarks.data_build --records $(RECORDS) --kills 5

# DeepSpeed compiles its operators when it is installed or first used, against the torch that is there.
test-distributed: $(VENV)/deepspeed
	nice $(BIN)/python -m tests.distributed --write

$(VENV)/deepspeed: $(VENV)/installed
	$(PIP) setuptools wheel ninja py-cpuinfo
	$(PIP) --no-build-isolation -e ".[deepspeed]"
	touch $@

# One program in stages: correctness, speed, tile sizes, training, memory accesses. See benchmarks/gpu.py.
MINUTES ?= 8
gpu:
	$(PYTHON) -m benchmarks.gpu --minutes $(MINUTES) --out runs/gpu

test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest

# torch is installed first: other packages then keep it and do not pull in a CUDA build.
$(VENV)/installed: pyproject.toml setup.py constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ".[dev]"
	touch $@

$(OLDEST)/installed: pyproject.toml setup.py constraints-cpu.txt constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP_INSTALL) torch==$(OLDEST_TORCH)
	$(OLDEST)/bin/python $(PIP_INSTALL) torch==$(OLDEST_TORCH) -c constraints-oldest.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist site *.egg-info runs .pytest_cache .ruff_cache .hypothesis
