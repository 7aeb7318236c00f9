.PHONY: help setup parity quick test test-slow test-gpu test-kernels test-published published map mutants lint format clean
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python -m
SHARED = -n auto --maxprocesses 8 --dist loadgroup  # out among the cores

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet -c constraints.txt torch jax jaxlib
	$(RUN) pip install --quiet -c constraints.txt -e '.[torch,jax,test]'
	@touch $@

setup: $(VENV)/installed  ## set up .venv with pinned versions, and no more

parity: $(VENV)/installed  ## do PyTorch and JAX compute the same thing? (sets up .venv first)
	$(RUN) parity check --no-json

quick: $(VENV)/installed  ## those that start no process: under a minute
	$(RUN) pytest $(SHARED) --quick

test: $(VENV)/installed  ## the tests
	$(RUN) pytest $(SHARED)

test-slow: $(VENV)/installed  ## the tests that take minutes
	$(RUN) pytest $(SHARED) -m slow

test-gpu: $(VENV)/installed  ## the tests that need a GPU
	$(RUN) pytest -m gpu

test-kernels: $(VENV)-triton/installed  ## kernels without a GPU: in Triton's interpreter, and compiled for an H200
	TRITON_INTERPRET=1 $(VENV)-triton/bin/python -m pytest tests/test_kernels.py
	$(VENV)-triton/bin/python -m pytest -m compilers

# The interpreter does not run under the NumPy that is pinned for everything else. XLA's compiler for GPUs comes
# without the libraries that only running would need.
JAX = $(shell sed -n 's/^jax==//p' constraints.txt)
$(VENV)-triton/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-triton
	$(VENV)-triton/bin/pip install --quiet 'numpy<2.3' triton torch jax==$(JAX) jaxlib==$(JAX) -e '.[test]'
	$(VENV)-triton/bin/pip install --quiet --no-deps jax-cuda13-plugin==$(JAX) jax-cuda13-pjrt==$(JAX)
	@touch $@

test-published: $(VENV)-published/installed  ## published layers, in an environment of their own (Python 3.12)
	$(VENV)-published/bin/python -m pytest -m published

published: $(VENV)-published/installed  ## the table in docs/published.md: each preset against each published layer
	@$(VENV)-published/bin/python tests/published_table.py

map: $(VENV)-published/installed  ## the map of published layers, into survey/ (half an hour)
	$(VENV)-published/bin/python -W ignore -m parity survey

# Megatron-Core and MaxText need Python 3.12; of jax, MaxText needs a newer release than all else is pinned to.
PYTHON312 ?= python3.12
$(VENV)-published/installed: pyproject.toml
	$(PYTHON312) -m venv $(VENV)-published
	$(VENV)-published/bin/pip install --quiet torch==2.13.0 jax==0.11.1 jaxlib==0.11.1 transformers==5.24.0 \
		megatron-core==0.19.2 torchtitan==0.3.0 maxtext==0.2.5 -e '.[transformers,megatron,torchtitan,maxtext,test]'
	@touch $@

mutants: $(VENV)/installed  ## change the implementations by machine, one thing at a time: does `check` notice? (hours)
	$(VENV)/bin/python tests/mutants.py

lint: $(VENV)/installed  ## ruff, who imports whom, and pyright
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(VENV)/bin/lint-imports --no-logo --no-cache
	$(RUN) pyright

format: $(VENV)/installed  ## let ruff rewrite
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) $(VENV)-triton $(VENV)-published .cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
