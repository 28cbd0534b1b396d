# fedmed's habits. `make` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for each in python3 python3.13 python3.12 python3.11; do \
  $$each -c '$(FITS)' 2>/dev/null && echo $$each && break; done)
BIN := .venv/bin
TASK ?= cxr
MINUTES ?= 60
TESTERS ?= 3

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "fedmed needs Python 3.11, 3.12 or 3.13; set PYTHON=/path/to/python3.x"; exit 1; }
	@echo "installing into .venv: several GB, for some minutes"
	@$(PYTHON) -m venv .venv || { echo "python venv is missing; on Debian: apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv sync --quiet --all-extras --compile-bytecode
	@touch $@

install: .venv/installed ## make .venv with everything in it

demo: .venv/installed ## four phantom hospitals train a network on DICOM: make demo [TASK=cxr|lung-seg]
	@mkdir -p phantoms
	@test -d phantoms/$(TASK) || $(BIN)/fedmed data synth phantoms/$(TASK) --task $(TASK)
	@$(BIN)/fedmed simulate phantoms/$(TASK)/run.toml

flower-demo: .venv/installed ## the same federation through `flwr run . local`, Flower's own simulation
	@$(BIN)/python simulations/flower-demo/run.py

test: .venv/installed ## all kinds of tests at small counts, ten minutes on two cores: make test [TESTERS=3]
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(TESTERS) --dist loadscope --no-loadscope-reorder

test-slow: .venv/installed ## the long ones: grids, baselines of the demo
	@$(BIN)/python -m pytest -m slow

soak: .venv/installed ## a server and three sites for an hour: does their memory stay flat? make soak [MINUTES=60]
	@$(BIN)/python tests/soak.py --minutes $(MINUTES)

check: .venv/installed ## style, types and architecture
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_architecture.py

bench: .venv/installed ## time engine, algorithms, reading, networks, aggregation, many and absent sites; more: benchmarks/*.py
	@$(BIN)/python benchmarks/engine.py
	@$(BIN)/python benchmarks/algorithms.py
	@$(BIN)/python benchmarks/data.py
	@$(BIN)/python benchmarks/networks.py
	@$(BIN)/python benchmarks/aggregation.py
	@$(BIN)/python benchmarks/scale.py
	@$(BIN)/python benchmarks/dropout.py

wheelhouse: .venv/installed ## every wheel with hashes, SBOM and signature, for hospitals without a registry
	@$(BIN)/python tools/wheelhouse.py wheelhouse wheelhouse.key

clean: ## remove what the targets made, but not runs/
	rm -rf .venv phantoms dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help install demo flower-demo test test-slow soak check bench wheelhouse clean
