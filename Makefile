# `make demo` and `make test` need Python 3.11 or newer and nothing else. The other targets are for developers.

VENV ?= .venv
# The first Python on the path that is new enough; it only makes the virtual environment.
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
# What pip is given for torch: `make demo TORCH="torch==2.13.0 --index-url ..."` takes another build.
TORCH ?= torch==2.13.0
# More flags for `moefleet demo`, such as DEMO="--http-port 8100".
DEMO ?=
# What `make test` runs.
TESTS ?= tests
# Processes that run fast tests, and slow ones of one process. Others start processes of their own and run one by one.
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input
NATIVE := shards/kernels/_native.so
NATIVE_SOURCES := hatch_build.py $(wildcard shards/kernels/native/*)
# One thread a process: tests run side by side, and ranks are processes.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: demo test test-fast test-slow lint coverage native clean install install-dev
.DEFAULT_GOAL := demo
.DELETE_ON_ERROR:

demo: install
	$(BIN)/moefleet demo $(DEMO)

test: test-fast test-slow

test-fast: install-dev
	$(PYTEST) -m "not slow" -n $(JOBS) --dist loadfile $(TESTS)

# 5 is pytest's "nothing collected": a TESTS of our own choice may hold no slow test.
test-slow: install-dev
	$(PYTEST) -m "slow and side_by_side" -n $(JOBS) --dist loadfile $(TESTS) || [ $$? -eq 5 ]
	$(PYTEST) -m "slow and not side_by_side" $(TESTS) || [ $$? -eq 5 ]

lint: install-dev
	$(BIN)/ruff check --no-cache
	$(BIN)/ruff format --no-cache --check
	$(BIN)/pyrefly check
	$(BIN)/lint-imports --no-cache --no-logo

# Every branch of router/ and of the pure half of cluster/, by the tests of those modules alone.
coverage: install-dev
	$(PYTEST) --cov -m "not slow" -n $(JOBS) --dist loadfile $$($(BIN)/python -m tests.support.pure_tests)

native: install
	$(BIN)/python hatch_build.py

clean:
	rm -rf $(VENV) .demo build dist .coverage .pytest_cache .hypothesis .ruff_cache .import_linter_cache
	rm -f $(NATIVE)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

install: $(VENV)/.installed $(NATIVE)

install-dev: $(VENV)/.installed-dev $(NATIVE)

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then echo "no Python 3.11 or newer on the path; name one: make PYTHON=/path/to/python3"; exit 1; fi
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (some minutes the first time; torch alone is hundreds of megabytes)"
	$(PIP) $(TORCH)
	$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what tests and checks need"
	$(PIP) -c constraints.txt -e '.[dev]'
# Tests run the kernels for GPUs in Triton's interpreter. CUDA builds of torch bring the version that they need.
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) triton==3.9.0
	@touch $@

# Without a compiler this says so, and the torch kernels run.
$(NATIVE): $(NATIVE_SOURCES) | $(VENV)/.installed
	-$(BIN)/python hatch_build.py
