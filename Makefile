# Every target makes its own virtual environment, with all that the project needs, on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_VENV ?= .venv-demo
DEMO_READY := $(DEMO_VENV)/.ready
SOURCES := pyproject.toml $(wildcard CMakeLists.txt) $(shell find native src -type f ! -name "*.pyc" ! -name "*.jpg" ! -name "*.so")
FIGURES ?= benchmarks/results
DATA ?= data/cifar10-jpeg

.PHONY: help demo test check bench bench-training zoo programs clean

help:
	@echo "make demo            classify the photographs that ship with the project, dense and dynamic, without torch"
	@echo "make test            run the tests"
	@echo "make check           format, lint, types and tests"
	@echo "make bench           measure the engine beside others, into $(FIGURES)"
	@echo "make bench-training  measure what training with gates costs, into $(FIGURES)"
	@echo "make zoo             train the shipped weights anew from DATA=$(DATA) (hours)"
	@echo "make programs        compile the zoo's models anew"

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

$(DEMO_READY): $(SOURCES)
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python -m pip install --quiet '.[demo]'
	@touch $@

demo: $(DEMO_READY)
	$(DEMO_VENV)/bin/thrifty demo

test: $(READY)
	$(BIN)/python -m pytest -q

check: $(READY)
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

bench: $(READY)
	$(BIN)/python benchmarks/engine.py --output $(FIGURES)/engine.csv

bench-training: $(READY)
	$(BIN)/python benchmarks/training_step.py --output $(FIGURES)/training_step.csv
	$(BIN)/python benchmarks/training_step.py --compile --output $(FIGURES)/training_step_compiled.csv
	$(BIN)/python benchmarks/loader_share.py --output $(FIGURES)/loader_share.csv

zoo: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" scripts/train_zoo.sh $(DATA)

programs: $(READY)
	$(BIN)/python scripts/compile_zoo.py

clean:
	rm -rf $(VENV) $(DEMO_VENV) build dist .pytest_cache .mypy_cache .ruff_cache
