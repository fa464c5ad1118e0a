# make demo    draw a few pictures with the bundled model
# make test    the tests
# make lint    style, types, layers, prose, and the documentation site
# make docs    build the documentation site into site/; a dead link or a public name without a docstring fails
# make bench   how fast sampling is
# Each makes the .venv it needs; PYTHON=python3.12 chooses which Python that is made from.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Strict by mkdocs.yml. The banner of mkdocs-material is about another major version.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
RECENT := import sys; sys.exit(sys.version_info < (3, 11))

.PHONY: demo test lint docs bench
.DEFAULT_GOAL := demo

demo: $(VENV)/.runtime
	$(BIN)/mar demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal -rs

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/check_prose.py
	$(MKDOCS)

docs: $(VENV)/.dev
	$(MKDOCS)

bench: $(VENV)/.runtime
	$(BIN)/python benchmarks/sampling.py --preset exact balanced fast

# An environment that is there already is adopted, whoever made it, if its Python will do.
$(VENV)/.made:
	@test -x $(BIN)/python || $(PYTHON) -c '$(RECENT)' || \
	  { echo "mar needs Python 3.11 or later, and $(PYTHON) is not that: try make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c '$(RECENT)' || \
	  { echo "the Python in $(VENV) is older than 3.11: remove $(VENV) and run make again" >&2; exit 1; }
	@touch $@

$(VENV)/.runtime: pyproject.toml constraints.txt $(VENV)/.made
	$(PIP) install -c constraints.txt -e .
	@touch $@

# Whoever has the tools of development has what is needed to run, too.
$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.made
	$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $(VENV)/.runtime $@
