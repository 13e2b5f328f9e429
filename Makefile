# make test      makes the environment, then tests every operation and property, in JOBS=2 processes: minutes;
#                ARGS='-k NAME' and the like reach pytest
# make test-all  the same, and the exhaustive tests: whole grids, ahead-of-time compiles, kill points, notebooks
# make numerics  the numeric contract with each instruction set and number of threads that this processor has
# make demo      the same, then trains the small model: reward curve, pictures before and after, allocation strips
# make overhead  the same, then what maps, weights and a step cost here; four minutes; ARGS=--thorough is behind README's numbers
# make gpu       on a machine with a GPU: its tests, sanitizers, tuning and benchmarks; OUT=DIR takes the results
# make gpu-study on a machine with a GPU: the learning study at its full size; goes on where it stopped, in runs/; OUT=DIR as above
# make sanitize  the CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; four minutes
# make mutation  each constant and operator of the definitions changed in turn, and the tests run; ARGS='--only policy'
# make coverage  the tests with the lines counted that they reach; fails under 95 %
# make test-lower  the tests of what uses other packages, in .venv-lower with the oldest versions that pyproject.toml allows
# make lint      formatting, lint, types
# make docs      the documentation's site, in site/; a broken link is an error
#
# They make .venv once, with the pinned set of constraints.txt. VENV=DIR uses an existing environment instead, with the
# torch that it has: only this package is built into it.

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

# torch is the pinned one; where the index has the declared lower bound: make test-lower TORCH=2.11.0
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

OUT ?= benchmarks/results
gpu: $(STAMP)
	$(PYTHON) -m tools.gpu --out $(OUT)

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
	$(VENV)/bin/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu,$(SOURCES)) $(wildcard tests/csrc/*.cpp)

docs: $(STAMP)
	$(PYTHON) -m mkdocs build

$(STAMP): pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip $(INSTALL)
	touch $@

clean:
	rm -rf .venv .venv-lower build site star_kernels/lib *.egg-info
