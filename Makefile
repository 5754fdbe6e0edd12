# `make help` lists the targets. Everything lives in .venv; nothing is installed outside the checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXAMPLES_READY := $(VENV)/.examples-ready

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-fast test test-long examples api wheel-test floors lint types gpu bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-10s %s\n", $$1, $$2}'

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tokenlabel needs Python 3.11 or newer, found " + sys.version.split()[0] + "; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(EXAMPLES_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[examples]'
	@touch $@

setup: $(READY)  ## make the environment in .venv

demo: $(READY)  ## train with token labels on real handwriting (at most 7 minutes on two cores)
	$(BIN)/tokenlabel demo

demo-fast: $(READY)  ## the same stages in under 90 seconds, with fewer images and steps
	$(BIN)/tokenlabel demo --fast

test: $(READY)  ## the tests (five to seven minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not long and not gpu'  # what a file's tests share is made once

test-long: $(READY)  ## the tests that take longer: 20 kills, whole studies
	$(BIN)/python -m pytest -m long

examples: $(EXAMPLES_READY)  ## the commands of README and guides, the notebook and other libraries' training loops, each run in small
	$(BIN)/python -m pytest examples

api: $(READY)  ## docs/api.md from the docstrings of the public names
	$(BIN)/python -m release.api

wheel-test:  ## the wheel in a fresh environment and an empty folder, as a stranger uses it (fetches PyTorch)
	release/wheel.sh $(PYTHON)

floors:  ## the tests on the oldest torch, torchvision and timm that we name (fetches PyTorch)
	release/floors.sh $(PYTHON)

lint: $(READY)  ## ruff: style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(EXAMPLES_READY)  ## pyright
	$(BIN)/pyright

gpu: $(READY)  ## tests and benchmarks that need a GPU
	$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make gpu needs a CUDA device, and PyTorch sees none")'
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m benchmarks --device cuda

bench: $(READY)  ## every figure of docs/benchmarks.md again
	$(BIN)/python -m benchmarks

clean:  ## remove the environment and the runs
	rm -rf $(VENV) runs
