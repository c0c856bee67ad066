# Everything runs in .venv, which is made on first use from python3 alone. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
OLDEST_JAX := 0.10.0
INSTALL := -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test test-oldest lint format wheel clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed ## train with and without batch normalization; table and figure under results/
	$(BIN)/python -m experiments convergence

test: $(VENV)/.installed ## the whole test suite
	$(BIN)/python -m pytest --numprocesses 2

lint: $(VENV)/.installed ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed ## rewrite in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-oldest: ## the library's tests on the oldest supported jax
	test -d $(OLDEST) || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(INSTALL) --editable '.[test]' 'jax==$(OLDEST_JAX)' 'jaxlib==$(OLDEST_JAX)'
	$(OLDEST)/bin/python -m pytest --numprocesses 2

wheel: $(VENV)/.installed ## build the wheel under dist/
	$(BIN)/python -m build --wheel

clean: ## remove everything that was made
	rm -rf $(VENV) $(OLDEST) dist results .pytest_cache .hypothesis .ruff_cache
