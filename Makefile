# One command each, the same for people and for CI. A bare machine needs CPython 3.11, gcc and make.

VENV := .venv
BIN  := $(VENV)/bin
# `import venv, ensurepip` fails where Debian left them out, and a version manager's shim can exist without its Python.
PYTHON ?= $(firstword $(foreach p,python3.11 python3 python,$(shell $(p) -c 'import ensurepip, sys, venv; \
	sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1 && command -v $(p))))
PIP  := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
# Passed on by race, test and bench: make race ARGS="--rounds 50", make test ARGS="-m 'not slow'"
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # two pips in one environment would corrupt it
.PHONY: race test lint docs bench clean help

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'

race: $(VENV)/.race ## race the methods to one accuracy, write report.html (ARGS= adds options of `shoal race`)
	$(BIN)/shoal race $(ARGS)

test: $(VENV)/.test ## the whole test suite, a process a core (ARGS="-m 'not slow'" for the fast part)
	$(BIN)/python -m pytest --numprocesses auto $(ARGS)

lint: $(VENV)/.test ## ruff, mypy, who may import whom, spelling; all of them, whatever the first says
	@failed=0; for check in "ruff check ." "ruff format --check ." mypy "lint-imports --no-cache --no-logo" codespell; do \
		echo "lint: $$check"; $(BIN)/$$check || failed=1; done; exit $$failed

docs: $(VENV)/.docs ## run the pages' examples and build docs/_build/html; warnings are errors
	$(BIN)/python scripts/run_examples.py
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs: docs/_build/html/index.html"

bench: $(VENV)/.test ## time rounds, races and memory on this machine
	$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove the environment, builds and caches; keep results
	rm -rf $(VENV) build dist *.egg-info docs/_build .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find shoal tests benchmarks scripts docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Each stamp is newer than what it was made from, so nothing is installed twice and a changed pin is.
$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "shoal needs CPython 3.11 with its venv module, and found none:" \
		"install it, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.race: requirements/race.txt pyproject.toml $(VENV)/.made
	$(PIP) -r requirements/race.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.test: requirements/test.txt requirements/gpu.txt $(VENV)/.race
	$(PIP) -r requirements/test.txt
	@# A CUDA build of torch has pinned a Triton of its own, which stays.
	@$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) --no-deps -r requirements/gpu.txt
	@touch $@

$(VENV)/.docs: requirements/docs.txt $(VENV)/.race
	$(PIP) -r requirements/docs.txt
	@touch $@
