# `make demo` and `make test` each need a Python 3.11 or newer and nothing else: they make .venv and fill it.
# A stamp in .venv remembers what was installed for which setup.py, so that only the first run takes minutes.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-slow lint format docs bench clean

# The first that is new enough and can make a virtual environment; `make PYTHON=...` chooses another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	"$$p" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$p" && break; done)
WORKERS ?= 2
ARGS ?=

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install
TREE := .make/restpoint
BENCHMARKS := $(wildcard benchmarks/*.py)

demo: $(VENV)/.base
	$(VENV)/bin/restpoint demo $(ARGS)

# Two processes of one thread each are faster than one process of two: the tensors are small.
test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-slow: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "slow or exhaustive" $(ARGS)

# mypy sees the rooms through links in a folder called restpoint; its messages should name the files themselves.
lint: $(VENV)/.dev $(TREE)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy | sed 's|^\.make/restpoint/||'

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/.docs $(TREE)
	$(VENV)/bin/python -m mkdocs build --strict

bench: $(VENV)/.bench
	for file in $(BENCHMARKS); do echo "== $$file"; $(VENV)/bin/python "$$file" $(ARGS); done

clean:
	rm -rf .make .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist site *.egg-info

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with venv found; name one by PYTHON=..." >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.base: setup.py | $(VENV)/bin/python
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: setup.py | $(VENV)/bin/python
	$(PIP) --editable ".[dev]"
	touch $(VENV)/.base $@

$(VENV)/.docs: setup.py | $(VENV)/bin/python
	$(PIP) --editable ".[docs]"
	touch $(VENV)/.base $@

$(VENV)/.bench: setup.py | $(VENV)/bin/python
	$(PIP) --editable ".[bench]"
	$(PIP) --no-deps "qpth>=0.0.18"
	touch $(VENV)/.base $@

$(TREE): Makefile
	mkdir -p $@
	for item in solvers models zoo train __init__.py py.typed; do ln -sfn "../../$$item" "$@/$$item"; done
	touch $@
