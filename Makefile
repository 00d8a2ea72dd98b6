# Every target sets up what it needs: `make demo` and `make test` work on a fresh clone.
#
#   make demo      scan, train and compare on the bundled lab model; writes gradshield-demo/
#   make gateway   the fine-tuning API on the bundled lab model, at 127.0.0.1:8000; writes gradshield-gateway/
#   make test      the test suite without its slow tests: some minutes on two cores
#   make test-all  every test
#   make check     ruff, mypy, import layers, the documentation's links
#   make docs      the documentation as a site that opens offline: site/index.html
#   make bench     the lab grid, its quick form
#   make install   only the virtual environment, .venv
#
#   PYTHON=python3.12    the interpreter to build .venv with (3.11 or newer)
#   TORCH_SOURCE="--extra-index-url https://download.pytorch.org/whl/cpu"    torch without CUDA, a much smaller download;
#                        any options of pip install, such as --find-links FOLDER with its wheel
#   JOBS=2               processes that tests run in
#   ARGS="..."           passed on: make test ARGS="tests/data -x", make demo ARGS="--task arithmetic"

PYTHON ?= python3
TORCH_SOURCE ?=
ARGS ?=
JOBS ?= 2

BIN := .venv/bin
STAMP := .venv/.installed
TRAIN := .venv/.train
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt

.PHONY: demo gateway test test-all check docs bench install

demo: $(TRAIN)
	$(BIN)/gradshield demo $(ARGS)

gateway: $(STAMP)
	$(BIN)/gradshield serve --model lab $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow" --durations=20 $(ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --durations=20 $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python -m benchmarks.lab_grid --quick $(ARGS)

install: $(STAMP)

$(TRAIN): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "make: there is no '$(PYTHON)' here: install Python 3.11 or newer, or name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $$($(PYTHON) --version 2>&1) is too old: GradShield needs Python 3.11 or newer; name one with PYTHON=python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || { echo "make: $(PYTHON) cannot make a virtual environment: install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "Installing torch into .venv (once, some minutes)"
	@$(PIP) $(TORCH_SOURCE) "torch==2.13.0"
	@echo "Installing GradShield and what it needs (a minute or two)"
	@$(PIP) -e ".[train]"
	@touch $@

$(STAMP): $(TRAIN)
	@echo "Installing what its tests, checks and documentation need (a minute or two)"
	@$(PIP) --use-pep517 -e ".[dev]"
	@touch $@
