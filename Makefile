# make demo | test | setup | lint | bench — each does its own set-up on a fresh machine and works twice in a row.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

.PHONY: setup demo test lint bench

setup: $(STAMP)

# torch first and pinned: packages that ask for a plain `torch` then find it installed.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[mpi,dev]'
	touch $(STAMP)

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tools/demo.sh

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tools/check.sh

bench: setup
	for bench in tools/bench/[a-z]*.py; do $(BIN)/python $$bench --quick || exit 1; done
