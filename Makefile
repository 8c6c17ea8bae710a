# `make help` lists the targets. Another Python: `make test PYTHON=python3.13`, which makes .venv-3.13.
# VENV names another folder; it is emptied whenever the virtualenv is made anew.

ifndef PYTHON
# The first that starts and can make virtualenvs: a name on PATH may be a shim with nothing behind it.
PYTHON := $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)
VENV ?= .venv
else
VENV ?= .venv-$(patsubst python%,%,$(notdir $(PYTHON)))
endif

RUN = $(VENV)/bin/python -m

.PHONY: help demo bench bench-step test fuzz test-onnx lint types format table docs clean
.NOTPARALLEL:

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 16

demo: $(VENV)/installed-test ## Train a BrainState layer inside a Flax model
	$(VENV)/bin/python examples/embed_in_flax.py

bench: $(VENV)/installed-test ## Measure speed beside the alternatives; writes tests/benchmarks/RESULTS.md
	$(VENV)/bin/python tests/benchmarks/bench.py --write

bench-step: $(VENV)/installed-test ## Time a train step of 100 M parameters, on a GPU; writes tests/benchmarks/TRAIN_STEP.md
	$(VENV)/bin/python tests/benchmarks/train_step.py --write

test: $(VENV)/installed-test ## Run the tests; more pytest options in ARGS
	$(RUN) pytest -n 2 --dist worksteal $(ARGS)

fuzz: $(VENV)/installed-test ## Convert random models for MINUTES=60, from SEED=0 on
	$(VENV)/bin/python tests/fuzz.py $(or $(MINUTES),60) $(or $(SEED),0)

test-onnx: ## Run the tests of ONNX, in a virtualenv of their own
	$(MAKE) $(VENV)-onnx/installed-onnxtest VENV=$(VENV)-onnx
	$(VENV)-onnx/bin/python -m pytest tests/test_onnx.py $(ARGS)

lint: $(VENV)/installed-lint ## Check format and style
	$(RUN) ruff format --check .
	$(RUN) ruff check .

types: $(VENV)/installed-test $(VENV)/installed-lint ## Check types
	$(RUN) pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/python tests/typing/completeness.py

format: $(VENV)/installed-lint ## Format, and mend what can be mended
	$(RUN) ruff check --fix-only .
	$(RUN) ruff format .

table: $(VENV)/installed-test ## Write the tables of README.md and docs (on Python 3.13: its layers are the newest)
	PYTHONPATH=. $(VENV)/bin/python tests/support_table.py
	PYTHONPATH=. $(VENV)/bin/python tests/layer_table.py

docs: $(VENV)/installed-docs ## Build the documentation into out/docs; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict --quiet

clean: ## Remove the virtualenvs and all caches
	rm -rf .venv .venv-* build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Made anew when pyproject.toml changes, so that nothing stays installed that it no longer names.
$(VENV)/made: pyproject.toml
	$(if $(PYTHON),,$(error No Python 3.11 or newer with the venv module: make PYTHON=/path/to/python))
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(VENV)/installed-%: $(VENV)/made
	$(RUN) pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@
