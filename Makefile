# `make demo` and `make test` each do everything on a fresh machine: Python 3.10+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOG := $(VENV)/install.log

# CrypTen depends on the retired package name "sklearn", which refuses to build
# without this.
export SKLEARN_ALLOW_DEPRECATED_SKLEARN_PACKAGE_INSTALL := True
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Many processes import torch: seconds each where its bytecode may not be kept.
unexport PYTHONDONTWRITEBYTECODE

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install venv demo test test-fast test-random coverage zoo wheel lint bench bench-full clean

help:
	@echo "make demo        two parties classify 256 real images; writes out/"
	@echo "make test        ruff, mypy and pytest"
	@echo "make test-fast   the tests that start no process, side by side"
	@echo "make test-random the whole suite in an order drawn anew"
	@echo "make coverage    the whole suite, and the lines it does not reach"
	@echo "make zoo         every line of tests/zoo.baseline anew (an hour)"
	@echo "make wheel       a built wheel, tried outside the checkout"
	@echo "make bench       the short benchmarks"
	@echo "make bench-full  every benchmark (hours)"
	@echo "make install     only the virtual environment, in $(VENV)"
	@echo "make clean       remove what make created"

install venv: $(STAMP)

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3"; exit 1; }
	@echo "[1/3] virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "python3 -m venv failed: install your system's python3-venv package"; \
	    exit 1; }
	@echo "[2/3] installing the pinned requirements (a minute or two)"
	@$(BIN)/python -m pip install --no-compile -r requirements.txt >$(LOG) 2>&1 \
	  & trap "kill $$!" INT TERM; pip=$$!; shown=0; \
	  while kill -0 $$pip 2>/dev/null; do \
	    sleep 2; now=$$(grep -c "^Collecting" $(LOG) || true); \
	    [ $$now -lt $$((shown + 8)) ] || { echo "      $$now packages found"; shown=$$now; }; \
	  done; \
	  wait $$pip || { tail -n 25 $(LOG); echo "the whole log: $(LOG)"; exit 1; }
	@# CrypTen's sources warn when they are compiled: once here, not in every test.
	@$(BIN)/python -W ignore -m compileall -q $(VENV)/lib/python3*/site-packages/crypten
	@touch $@
	@echo "[3/3] installed"

demo: $(STAMP)
	$(BIN)/python -m crypten_espn.cli demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: lint
	$(BIN)/python -m pytest

test-fast: $(STAMP)
	$(BIN)/python -m pytest --in-process -m "not slow" -n auto --maxprocesses 4 --dist worksteal

test-random: $(STAMP)
	$(BIN)/python -m pytest -p randomly --hypothesis-profile=default

# Parties that tests start as processes are not measured, only what runs in pytest's own.
coverage: $(STAMP)
	$(BIN)/python -m pytest --cov=crypten_espn --cov-report=term-missing:skip-covered

zoo: $(STAMP)
	$(BIN)/python -m tests.zoo

wheel: $(STAMP)
	.ci/wheel $(BIN)/python

bench: $(STAMP)
	$(BIN)/python -m benchmarks.report

bench-full: $(STAMP)
	$(BIN)/python -m benchmarks.report --full

clean:
	rm -rf $(VENV) out build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache \
	  .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
