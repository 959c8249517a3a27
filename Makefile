# Every target makes its own virtual environment, with all that the project needs, on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FIGURES ?= benchmarks/results
DATA ?= data/cifar10-jpeg

.PHONY: help demo test check bench zoo clean

help:
	@echo "make demo    classify the photographs that ship with the project, dense and dynamic"
	@echo "make test    run the tests"
	@echo "make check   format, lint, types and tests"
	@echo "make bench   measure what training with gates costs, into $(FIGURES)"
	@echo "make zoo     train the shipped weights anew from DATA=$(DATA) (hours)"

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/thrifty demo

test: $(READY)
	$(BIN)/python -m pytest -q

check: $(READY)
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

bench: $(READY)
	$(BIN)/python benchmarks/training_step.py --output $(FIGURES)/training_step.csv
	$(BIN)/python benchmarks/training_step.py --compile --output $(FIGURES)/training_step_compiled.csv
	$(BIN)/python benchmarks/loader_share.py --output $(FIGURES)/loader_share.csv

zoo: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" scripts/train_zoo.sh $(DATA)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
