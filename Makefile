# Every target sets up what it needs on a fresh machine, and works twice in a row.
#
#   make demo      generated data, two trainings, evaluation, report
#   make test      all tests that need no GPU
#   make test-isa  the tests that must hold on any processor, under this machine's older instruction sets
#   make faults    the fault campaign in full; make test runs a few dozen of its cases
#   make lint      ruff, mypy, codespell
#   make bench     every benchmark in its quick form
#   make docs      the documentation site: build/site/index.html (its search box needs a server, such as
#                  python -m http.server --directory build/site)
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

.PHONY: setup demo test test-isa faults lint bench docs

setup: $(STAMP)

# torch is installed first and pinned: packages that ask for a plain `torch` then find it installed.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[mpi,dev]'
	touch $(STAMP)

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tools/demo.sh

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-isa: setup
	$(BIN)/python tools/other_cpus.py

faults: setup
	OMP_NUM_THREADS=1 IGD_DS_FAULTS=all $(BIN)/python -m pytest tests/faults

lint: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tools/check.sh

bench: setup
	for bench in tools/bench/[a-z]*.py; do $(BIN)/python $$bench --quick || exit 1; done

$(VENV)/.docs: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	touch $(VENV)/.docs

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file tools/mkdocs.yml
	$(BIN)/python tools/check_site.py build/site
