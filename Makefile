# Needs only make and a Python 3.11 or newer. Everything else lands in .venv, once, on first use.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The newest supported Python that works and can make environments; `make PYTHON=/path/to/python ...` overrides it.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3 python; do \
	$$python -c 'import ensurepip, ssl, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
		&& echo $$python && break; \
	done)

# Tests mostly wait, for processes to start and leases to end: more of them at once than a small machine has cores.
JOBS ?= 3

# How long `make soak` injects faults.
SOAK ?= 10m

export PATH := $(CURDIR)/$(BIN):$(PATH)
unexport PYTHONHOME PYTHONPATH VIRTUAL_ENV

.DEFAULT_GOAL := help
.PHONY: help demo dev test check lint types imports format bench soak lock build clean

help: ## Show this list
	@printf '\n  \033[1mByrd\033[0m: durable workflows for Celery\n\n'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  \033[36mmake %-8s\033[0m  %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@printf '\n'

demo: $(READY) ## Run the competitor monitor, kill a worker and flush Redis on the way
	@$(BIN)/python -m tasks.demo

dev: $(READY) ## Start everything in the Procfile, on embedded Postgres and Valkey
	@$(BIN)/byrd dev

test: $(READY) ## Run the tests; TESTS="-k name" narrows them
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(TESTS)

check: lint types imports test ## Run all that a change has to pass

lint: $(READY) ## Lint, and check the formatting
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(READY) ## Check the types
	@$(BIN)/python -m mypy

imports: $(READY) ## Check that imports point down the layers
	@$(BIN)/lint-imports

format: $(READY) ## Format the code, and fix what can be fixed safely
	@$(BIN)/ruff check --fix-only
	@$(BIN)/ruff format

bench: $(READY) ## Compare with Celery, other engines and bare SQL; BENCH=--quick takes 5 minutes
	@$(BIN)/python -m benchmarks $(BENCH)

soak: $(READY) ## Ten minutes of faults under full load, then an audit; SOAK=1h is longer
	@$(BIN)/byrd chaos --embedded --for $(SOAK) --report build/soak.json

lock: $(READY) ## Resolve the dependencies anew into constraints.txt
	@$(BIN)/python -m pip install --quiet uv
	@head -n 1 constraints.txt > constraints.txt.new
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --fork-strategy fewest --all-extras \
		--no-header --no-annotate --no-emit-index-url pyproject.toml >> constraints.txt.new
	@mv constraints.txt.new constraints.txt

build: $(READY) ## Build the wheel and the source archive into dist/
	@rm -rf dist
	@$(BIN)/python -m build

clean: ## Remove the environment, caches and builds
	rm -rf $(VENV) .bench build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache constraints.txt.new
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp holds the folder's path and is written last, so an environment that is unfinished, that came with a copied
# folder, or whose Python is gone, is made anew; one that is only older than its inputs is brought up to date.
USABLE := $(shell $(BIN)/python -c 'print(open("$(READY)").read().strip())' 2>/dev/null)
ifneq ($(USABLE),$(CURDIR))
.PHONY: $(READY)
endif

$(READY): pyproject.toml constraints.txt
	@if [ -z '$(PYTHON)' ]; then \
		printf 'Byrd needs Python 3.11 or newer with its venv and ssl modules, and found none on PATH.\n' >&2; \
		printf 'Install one (on Debian and Ubuntu: apt install python3-venv), or name it: make PYTHON=/path/to/python3.12\n' >&2; \
		exit 1; \
	fi
	@rm -f $@
	@if [ '$(USABLE)' != '$(CURDIR)' ]; then \
		printf 'Setting up %s with %s: a minute, once.\n' '$(VENV)' "$$($(PYTHON) -V)"; \
		rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); \
	fi
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@echo '$(CURDIR)' > $@
