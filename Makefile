# Every target makes its own environment in .venv if there is none; nothing else is needed but
# Python 3.10 or newer, a C++ compiler and make.

PYTHON ?= python3
VENV ?= .venv
# The CPU build of torch; override with TORCH=torch (or an index of your choice) for a GPU.
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
SOURCES = $(shell find csrc -type f) setup.py pyproject.toml
# pytest workers: one per core, at most four (memory).
WORKERS ?= $(shell $(PYTHON) -c "import os; print(min(4, os.cpu_count() or 1))")
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: demo test test-full check bench gpu clean

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

bench: $(VENV)/.bench
	$(BIN)/python -m bench run $(ARGS)

# On a machine with an NVIDIA GPU: the python3 that is there, with its own torch; nothing is fetched.
# make gpu PART=check|sanitize|shapes|nets|all; DRY=1 shows what can be shown without a GPU.
PART ?= all
gpu:
	$(PYTHON) -m bench gpu $(PART) $(if $(DRY),--dry) $(if $(COMMIT),--commit $(COMMIT)) $(ARGS)

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

# torch first: the build finds its headers in this environment and downloads no second one.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[demo,export,hub,test,dev]"
	touch $@

# The peers' packages, for those who compare: what the installed metadata ask for, because installing
# the package once more would compile all of it once more.
EXTRA = from importlib.metadata import requires; \
	print(*(r.split(";")[0] for r in requires("resunet_fast") if r.endswith("bench\"")), sep="\n")
$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -c '$(EXTRA)' > $(VENV)/bench.txt
	$(BIN)/python -m pip install --quiet --requirement $(VENV)/bench.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info resunet_fast/_C*.so resunet_fast/_build_info.json
