# Needs Python >= 3.11 and make; everything else is installed into .venv once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two test processes with one thread each use two cores better than one process with two threads.
# Each takes half of the tests in order, so that what a module sets up is set up once, then what the other has left.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all torture bench bench-check bench-deploy lint lock clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

quickstart: $(STAMP)  ## train dense and sparse networks on embedded data, then print the table (minutes on a CPU)
	$(BIN)/python train.py -m experiment=quickstart
	$(BIN)/python scripts/report.py quickstart

test: $(STAMP)  ## run the tests
	$(PYTEST)

test-all: $(STAMP)  ## run the tests, the long ones included
	$(PYTEST) -m "long or not long"

torture: $(STAMP)  ## kill 100 training runs at random moments and compare what they end with (about half an hour)
	$(BIN)/python scripts/torture.py --kills 100 --out results/benchmarks/torture.json

bench: $(STAMP)  ## measure speed against the plain way of doing things, write results/benchmarks (many minutes)
	$(BIN)/python scripts/bench.py $(BENCH)

bench-check: $(STAMP)  ## measure briefly, fail where a ratio is worse than the committed one
	$(BIN)/python scripts/bench.py --check $(BENCH)

lint: $(STAMP)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-deploy: $(STAMP) $(VENV)/.bench build/tflite/.installed  ## measure deployed networks against dense runtimes; goes on where it stopped
	TFLITE_PYTHON=build/tflite/bin/python OMP_NUM_THREADS=1 $(BIN)/python scripts/bench_deploy.py all
	$(BIN)/python scripts/report.py

$(VENV)/.bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[bench]"
	@touch $@

# LiteRT's converter is part of TensorFlow, which has an environment of its own
build/tflite/.installed:
	$(PYTHON) -m venv build/tflite
	build/tflite/bin/python -m pip install --quiet --disable-pip-version-check tensorflow-cpu
	@touch $@

install: $(STAMP)  ## create .venv and install the locked packages

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is missing or older than Python 3.11: install Python >= 3.11, or name one with 'make PYTHON=python3.12 ...'." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

lock:  ## resolve pyproject.toml afresh and rewrite requirements.lock
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check ".[lab,dev]"
	{ sed -n '/^#/p' requirements.lock; build/lock/bin/python -m pip freeze --all --exclude pip --exclude feather-sparsity \
		| grep -viE '^(nvidia-|cuda-|triton==)'; } > build/requirements.lock
	mv build/requirements.lock requirements.lock
	rm -rf build/lock

clean:  ## remove .venv and caches; runs, data and results stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
