# Every target makes its own virtual environment, with all that the project needs, on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_VENV ?= .venv-demo
DEMO_READY := $(DEMO_VENV)/.ready
SOURCES := pyproject.toml $(wildcard CMakeLists.txt) $(shell find native src -type f ! -name "*.pyc" ! -name "*.jpg" ! -name "*.so")
NATIVE := CMakeLists.txt $(shell find native -type f)
SANITIZED := build/sanitized
FIGURES ?= benchmarks/results
DATA ?= data/cifar10-jpeg

.PHONY: help demo test check check-native bench bench-training bench-accuracy zoo programs clean

help:
	@echo "make demo            classify the photographs that ship with the project, dense and dynamic, without torch"
	@echo "make test            run the tests, but for the largest networks"
	@echo "make check           format, lint, types and all tests"
	@echo "make check-native    the engine's tests under the address and undefined-behaviour sanitisers"
	@echo "make bench           measure the engine beside others, into $(FIGURES)"
	@echo "make bench-training  measure what training with gates costs, into $(FIGURES)"
	@echo "make bench-accuracy  measure what the shipped models reach at other costs, on DATA=$(DATA)"
	@echo "make zoo             train the shipped weights anew from DATA=$(DATA) (hours)"
	@echo "make programs        compile the zoo's models anew"

$(READY): pyproject.toml $(NATIVE)
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
	$(BIN)/python -m pytest -q -m "not large"

check: $(READY)
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/mypy
	$(BIN)/python scripts/readme_tables.py --check
	$(BIN)/python -m pytest -q

# An environment of its own: what is tested there needs no torch.
$(SANITIZED)/.ready: pyproject.toml $(NATIVE) $(shell find src -name "*.py")
	$(PYTHON) -m venv $(SANITIZED)
	$(SANITIZED)/bin/python -m pip install --quiet --upgrade pip
	$(SANITIZED)/bin/python -m pip install --quiet pytest hypothesis
	$(SANITIZED)/bin/python -m pip install --quiet -C build-dir=$(SANITIZED)/cmake -C cmake.define.THRIFTY_SANITIZE=ON .
	@touch $@

# Python itself is not sanitised, so the sanitiser's library has to be there first, and what Python keeps is no leak.
check-native: $(SANITIZED)/.ready
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(SANITIZED)/bin/python -m pytest -q --noconftest -p no:cacheprovider \
	tests/test_engine_operators.py tests/test_engine_calls.py tests/test_engine_checks.py tests/test_engine_gates.py \
	tests/test_conv_kernels.py tests/test_column_kernels.py tests/test_outer_kernel.py \
	tests/test_sharing.py tests/test_hostile_files.py

bench: $(READY)
	$(BIN)/python benchmarks/engine.py --output $(FIGURES)/engine.csv
	$(BIN)/python benchmarks/engine.py --method antidote --output $(FIGURES)/antidote.csv
	$(BIN)/python benchmarks/engine.py --method lcnet --output $(FIGURES)/lcnet.csv

bench-training: $(READY)
	$(BIN)/python benchmarks/training_step.py --output $(FIGURES)/training_step.csv
	$(BIN)/python benchmarks/training_step.py --compile --output $(FIGURES)/training_step_compiled.csv
	$(BIN)/python benchmarks/loader_share.py --output $(FIGURES)/loader_share.csv

bench-accuracy: $(READY)
	$(BIN)/python benchmarks/antidote_ratios.py --root $(DATA) --output $(FIGURES)/antidote_ratios.csv
	$(BIN)/python benchmarks/budgets.py --root $(DATA) --output $(FIGURES)/budgets.csv
	$(BIN)/python benchmarks/resnet20_costs.py --root $(DATA) --output $(FIGURES)/resnet20_costs.csv

zoo: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" scripts/train_zoo.sh $(DATA)

programs: $(READY)
	$(BIN)/python scripts/compile_zoo.py

clean:
	rm -rf $(VENV) $(DEMO_VENV) build dist .pytest_cache .mypy_cache .ruff_cache
