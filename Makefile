# Everything runs in .venv, which is made on first use and needs only python3. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
OLDEST_JAX := 0.10.0
NEWEST := .venv-newest
NEWEST_PYTHON ?= $(PYTHON)
PURE := .venv-pure
OTHERS := .venv-others
INSTALL := -m pip install --quiet --disable-pip-version-check

# The environments hold jax for the CPU. Without this line the compilers for TPUs and GPUs would search for a device.
export JAX_PLATFORMS ?= cpu

# `make test CACHE=1` keeps compiled programs under .cache, where the next run finds those that have not changed.
ifdef CACHE
export JAX_COMPILATION_CACHE_DIR = $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES = -1
endif

.PHONY: help demo claims more compiled bench test test-plain test-all oracles docs test-oldest test-newest test-pure test-flax lint format wheel clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.demo

$(VENV)/.demo: pyproject.toml constraints.txt
	@echo "installing what the experiments need into $(VENV), about a minute"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(INSTALL) --constraint constraints.txt --editable '.[experiments]'
	@touch $@

demo: $(VENV)/.demo ## train with and without batch normalization; table and figure under results/
	@$(BIN)/python -m experiments train
	@echo "next: docs/quick-start.md has the layer in your own code; other networks, data and devices are flags:"
	@echo "      $(BIN)/python -m experiments train --help"

claims: $(VENV)/.installed ## measure every claim made for batch normalization; report.html and verdicts.json under results/
	$(BIN)/python -m experiments all

more: $(VENV)/.installed ## measure more seeds for the undecided parts under results/, for two hours at most; run it again to continue
	$(BIN)/python -m experiments more

compiled: $(OTHERS)/.installed ## count memory traffic and collectives compiled for TPU and GPU, without either; tables, and a figure under results/
	$(OTHERS)/bin/python -m experiments compiled

$(OTHERS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OTHERS)
	$(OTHERS)/bin/python $(INSTALL) --constraint constraints.txt --editable '.[oracles]'
	touch $@

bench: $(OTHERS)/.installed ## time it against Flax, Haiku, Equinox, Keras and PyTorch; tables, and figures under results/
	$(OTHERS)/bin/python -m experiments bench

# The files are run in their order, which ends with short ones, so that both processes finish at about the same time.
test: $(VENV)/.installed ## the test suite, except what is inherently slow
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-plain: $(VENV)/.installed ## the tests of the pure functions with BNJAX_PLAIN=1: plain formulas, no lowerings of our own
	BNJAX_PLAIN=1 $(BIN)/python -m pytest --numprocesses 2 tests/core tests/variants bnjax/core bnjax/variants

test-all: $(VENV)/.installed ## the tests that `test` leaves out: processes, whole experiments, real models, programs for TPUs
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m slow

oracles: $(OTHERS)/.installed ## compare it live with PyTorch, Keras, Haiku, Equinox, Flax and ONNX; compile it for a GPU
	$(OTHERS)/bin/python -m pytest --numprocesses 2 --dist loadfile tests/oracles
	$(OTHERS)/bin/python -m pytest tests/experiments/test_compiled.py -m slow -k gpu

docs: $(VENV)/.installed ## build the documentation under site/; a broken link or an undocumented public name fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.installed ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed ## rewrite in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-newest: ## the library's tests on the newest supported jax, with the newest supported Python
	test -d $(NEWEST) || $(NEWEST_PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python $(INSTALL) --upgrade --editable '.[test]'
	$(NEWEST)/bin/python -m pytest --numprocesses 2

# For platforms such as macOS, which have no compilers for TPUs and GPUs.
test-pure: ## the tests of the pure functions, which need no Flax layers; with the newest supported jax
	test -d $(PURE) || $(PYTHON) -m venv $(PURE)
	$(PURE)/bin/python $(INSTALL) --editable '.[test]'
	$(PURE)/bin/python -m pytest --numprocesses 2 tests/core tests/variants bnjax/core bnjax/variants

test-oldest: ## the library's tests on the oldest supported jax
	test -d $(OLDEST) || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(INSTALL) --editable '.[test]' 'jax==$(OLDEST_JAX)' 'jaxlib==$(OLDEST_JAX)'
	$(OLDEST)/bin/python -m pytest --numprocesses 2

FLAX = .flax/flax-$(shell $(BIN)/python -c 'from importlib.metadata import version; print(version("flax"))')

test-flax: $(VENV)/.installed ## Flax's own tests of what uses BatchNorm, with ours in its place
	$(BIN)/python -m pip download --quiet --no-deps --no-binary flax --dest .flax flax==$(FLAX:.flax/flax-%=%)
	tar -xzf $(FLAX).tar.gz -C .flax
	cd $(FLAX)/tests && PYTHONPATH=$(CURDIR) $(CURDIR)/$(BIN)/python -m pytest -p tests.support.flax_swapped -W ignore \
		$$(grep -rl BatchNorm . --include='*_test.py')

wheel: $(VENV)/.installed ## build the wheel and the source distribution under dist/, and check both
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean: ## remove everything that was made
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(PURE) $(OTHERS) .cache .flax dist site results .pytest_cache .hypothesis .ruff_cache
