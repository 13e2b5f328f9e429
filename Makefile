# make test        tests of every operation and property, in JOBS=2 processes; takes minutes. ARGS is passed to pytest
# make test-all    all tests, including the exhaustive ones: whole grids, ahead-of-time compiles, kill points, notebooks
# make test-lower  tests that use other packages, in .venv-lower with the oldest versions that pyproject.toml allows
# make numerics    tests of the numeric contract with each instruction set and number of threads of this processor
# make sanitize    the CPU kernels with AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; four minutes
# make mutation    changes each constant and operator of the reference implementations in turn and runs the tests
# make coverage    all tests with line coverage; fails below 95 %
# make lint        checks formatting, style and types
# make demo        trains the small model; writes reward curves, images before and after, and allocation strips
# make overhead    benchmark of maps, weights and a training step; four minutes. ARGS=--thorough gives the figures in README
# make gpu         on a machine with a GPU: a queue of checks, benchmarks, tuning, tests and sanitizers, most valuable
#                  first; takes what fits into MINUTES=8 and is not recorded in OUT=DIR. ARGS=--list shows the queue
# make gpu-study   on a machine with a GPU: the study of learning curves at full size; resumes the runs in runs/
# make docs        builds the documentation's site in site/; a broken link is an error
#
# Each command first creates .venv with the pinned versions in constraints.txt and builds the package into it. VENV=DIR
# uses an existing environment instead, with its own torch; only this package is built into it.

ifeq ($(origin VENV), undefined)
VENV := .venv
INSTALL := install -c constraints.txt -e '.[dev]'
else
INSTALL := install --no-deps -e .
endif
STAMP := $(VENV)/.star-kernels
PYTHON := $(VENV)/bin/python
SOURCES := $(shell find csrc -type f)

.PHONY: test test-all test-exhaustive test-lower numerics
.PHONY: demo overhead gpu gpu-study sanitize mutation coverage lint docs clean

JOBS ?= 2
PYTEST := $(PYTHON) -m pytest -n $(JOBS) --dist worksteal
test: $(STAMP)
	$(PYTEST) $(ARGS)

test-all: $(STAMP)
	$(PYTEST) -m "" $(ARGS)

test-exhaustive: $(STAMP)
	$(PYTEST) -m exhaustive $(ARGS)

numerics: $(STAMP)
	$(PYTHON) tests/numerics.py -n $(JOBS) --dist worksteal $(ARGS)

# With the oldest torch, if the package index has it: make test-lower TORCH=2.11.0
TORCH ?= 2.13.0
LOWER := .venv-lower
LOWER_TESTS := tests/test_versions.py tests/test_figures.py tests/prompts tests/capture/test_families.py tests/trainer
test-lower:
	test -x $(LOWER)/bin/python || python3 -m venv $(LOWER)
	$(LOWER)/bin/python tests/lower_bounds.py torch==$(TORCH) > $(LOWER)/constraints.txt
	$(LOWER)/bin/python -m pip install -c $(LOWER)/constraints.txt -e '.[bench,rewards,train]' pytest hypothesis
	$(LOWER)/bin/python -m pytest $(LOWER_TESTS) $(ARGS)

DEMO ?= runs/demo
demo: $(STAMP)
	rm -rf $(DEMO)
	$(PYTHON) -m star_trainer --output.folder $(DEMO) $(ARGS)

overhead: $(STAMP)
	$(PYTHON) benchmarks/overhead.py $(ARGS)

gpu: OUT ?= benchmarks/results
gpu: MINUTES ?= 8
gpu: $(STAMP)
	$(PYTHON) -m tools.gpu --out $(OUT) --minutes $(MINUTES) $(ARGS)

gpu-study: OUT ?= studies/results
gpu-study: $(STAMP)
	$(PYTHON) -m studies.learning --design studies/designs/gpu.yaml --runs runs/learning-gpu \
		--out $(OUT)/learning-gpu.json $(ARGS)

sanitize: $(STAMP)
	$(PYTHON) tests/sanitize.py $(ARGS)

mutation: $(STAMP)
	$(PYTHON) tests/mutation.py $(ARGS)

coverage: $(STAMP)
	$(PYTHON) -m coverage erase
	$(PYTHON) -m coverage run -m pytest -m "" $(ARGS)
	$(PYTHON) -m coverage combine
	$(PYTHON) -m coverage report

lint: $(STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu %.cuh,$(SOURCES)) $(wildcard tests/csrc/*.cpp)

docs: $(STAMP)
	$(PYTHON) -m mkdocs build

$(STAMP): pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip $(INSTALL)
	touch $@

clean:
	rm -rf .venv .venv-lower build site star_kernels/lib *.egg-info
