# Every target makes its own environment in .venv if there is none; nothing else is needed but
# Python 3.10 or newer, a C++ compiler and make.

PYTHON ?= python3
VENV ?= .venv
# The CPU build of torch; override with TORCH=torch (or an index of your choice) for a GPU.
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
SOURCES = $(shell find csrc -name '*.cpp' -o -name '*.h') setup.py pyproject.toml
# pytest workers: one per core, at most four (memory).
WORKERS ?= $(shell $(PYTHON) -c "import os; print(min(4, os.cpu_count() or 1))")
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: demo test test-full check bench clean

demo: $(VENV)/.installed
	$(BIN)/python -m resunet_fast demo $(ARGS)

test: $(VENV)/.installed
	$(PYTEST) $(ARGS)

test-full: $(VENV)/.installed
	$(PYTEST) -m "" $(ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m bench $(ARGS)

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

# torch first: the build finds its headers in this environment and downloads no second one.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[demo,export,hub,test,dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info resunet_fast/_C*.so resunet_fast/_build_info.json
