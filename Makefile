# The same targets on a laptop and in CI (.ci/run). Linux and macOS, Python >= 3.11.
PYTHON ?= python3
RECIPE ?= demo
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test lint types bench clean

help:
	@echo "make demo [RECIPE=smoke]  install into .venv and train the default model on a real book"
	@echo "make test [ARGS='-k x']   install the development tools and run every test"
	@echo "make lint | types         ruff | pyright"
	@echo "make bench                the measurements that make test leaves out"
	@echo "make clean                remove .venv and caches; runs and results stay"

demo: $(VENV)/.installed
	$(BIN)/everlong train $(RECIPE)

# Two workers of one thread each: the suite's time on two cores.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/pyright

bench: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m benchmark -o timeout=0 $(ARGS)

clean:
	rm -rf $(VENV) $(VENV).incomplete build dist .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp says that an install ended. $(VENV).incomplete says that one began: where it is found, the last
# one was interrupted, perhaps in the middle of a package, and the environment is made again from nothing.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "everlong needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	@if [ -e $(VENV).incomplete ] || ! [ -x $(BIN)/python ]; then \
	  touch $(VENV).incomplete && $(PYTHON) -m venv --clear $(VENV); fi
	@touch $(VENV).incomplete
	@echo "Installing into $(VENV): about 1.4 GB and, the first time, a few minutes"
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e $(1)
	@rm $(VENV).incomplete
	@touch $(2)
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,.,$@)

$(VENV)/.installed-dev: pyproject.toml constraints.txt
	$(call install,".[dev]",$(VENV)/.installed $@)
