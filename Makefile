# `make repro` and `make test` each do everything on a machine with Python 3.11 and make.
# No setting of the pipeline lives here: in the environment that `make install` makes, `dvc repro` does the same.

PYTHON   ?= $(shell command -v python3.11 || command -v python3)
WORKLOAD ?=
VENV     := .venv
BIN      := $(CURDIR)/$(VENV)/bin
STAMP    := $(VENV)/.installed

# DVC runs the stages' `python`: it must be this environment's.
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install repro test long faults planted lint audit retrain-local clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16
	@echo "variables: WORKLOAD=name (a section of params.yaml), PYTHON=path of a Python 3.11"

install: $(STAMP)  ## the environment in .venv, with pinned versions

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
		|| { echo "Python 3.11 is needed; name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(VENV)/bin/python || "$(PYTHON)" -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[pipeline,dev]'
	touch $@

repro: $(STAMP)  ## the whole pipeline: from nothing to a registered champion, its table and its report
	python -m flows.repro --repro $(if $(WORKLOAD),--workload $(WORKLOAD))

# Two files at a time: what starts servers and actors mostly waits, and its waits are long enough for a busy machine.
test: $(STAMP)  ## the tests, but for those that take minutes each
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not long"

long: $(STAMP)  ## the tests that `make test` leaves out: minutes each, variations on what shorter ones show
	python -m pytest -m long

faults: $(STAMP)  ## the tests of every fault, the races longer; writes docs/faults.md
	python -m tests.faults --write

planted: $(STAMP)  ## faults planted in a copy of the code one by one: do the quick tests catch 95% of them?
	python -m tests.planted --json benchmarks/results/planted-faults.json

lint: $(STAMP)  ## ruff and mypy
	ruff check .
	mypy

audit: $(STAMP)  ## known faults of the pinned versions, as far as the public lists can be reached
	test -x $(VENV)/audit/bin/pip-audit || { $(VENV)/bin/python -m venv $(VENV)/audit \
		&& $(VENV)/audit/bin/python -m pip install --quiet pip-audit; }
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

retrain-local: $(STAMP)  ## Prefect server, pool, worker and the scheduled retraining on this machine, until Ctrl-C
	python -m flows.retrain_local

clean:  ## caches of tools; data, registry and environment stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find lesa flows tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
