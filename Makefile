# Two recipes matter: `make demo` shows what mergeflow does, `make test` shows that it is right.
# Everything is installed into .venv from pinned constraints; nothing else on the machine is touched.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-long fuzz cluster-test lint bench clean

demo: $(VENV)/.installed
	@$(BIN)/python launch.py overwrite=true

# Tests are divided among as many processes as there are cores; see tests/conftest.py.
test: lint
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4

test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m long

# Hostile files, metadata and configs; SEED=N chooses others. Where atheris is installed, ATHERIS more led by coverage.
CASES   ?= 20000
SEED    ?= 1
ATHERIS ?= 100000

fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m tests.fuzz --cases $(CASES) --seed $(SEED) --atheris $(ATHERIS)

# Hosts that are network namespaces: real `ray start` processes, cables that are pulled, machines that lose power. As root.
cluster-test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m cluster tests/cluster

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch first and pinned: an open range draws whatever is newest, which may be gigabytes of CUDA. Where the pinned
# version comes with CUDA too, PIP_EXTRA_INDEX_URL names an index with CPU builds (see PyTorch's installation page).
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing mergeflow into $(VENV) (once; torch and Ray take a minute)"
	@$(PIP) torch
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the development tools into $(VENV)"
	@$(PIP) --editable '.[dev]'
	@touch $@

# What is measured, and how: `make bench BENCH="floor merge --models 5 --scale 0.25 --dir /data/tmp"`
BENCH ?= all

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks $(BENCH)

clean:
	rm -rf $(VENV) demo merged .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
