# Everything a person types here. `make` alone lists the targets.

SHELL := /bin/sh
BIN := .venv/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format types docs lock clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: ## build the environment in .venv (skipped when up to date; PYTHON=... names the interpreter)
	@PYTHON='$(PYTHON)' sh scripts/setup.sh

demo: setup ## set up, then let two models answer privately and write report.html (ARGS=... goes to aero demo)
	@$(BIN)/aero demo $(ARGS)

test: setup ## set up, then run the tests (ARGS=... goes to pytest, e.g. ARGS='-m slow')
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: setup ## style and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: setup ## put the format right
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: setup ## static types
	@$(BIN)/mypy

# The pages' own tools stand in an environment of their own: nothing else needs them.
.venv-docs/ready: requirements/docs.txt
	@rm -rf .venv-docs
	@$(BIN)/python -m venv .venv-docs
	@.venv-docs/bin/python -m pip install --quiet --no-input --require-hashes --only-binary :all: -r requirements/docs.txt
	@touch $@

docs: setup .venv-docs/ready ## the documentation, as pages in site/; a broken link is an error
	@PYTHONPATH=src $(BIN)/python benchmarks/figures.py --out docs/figures
	@$(BIN)/aero report benchmarks/results $(wildcard benchmarks/results/study) --html docs/runs.html
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "The pages are in site/: open site/index.html."

# Every package with its version and hashes, for Python 3.10 and 3.11; torch excepted (requirements/torch.txt).
lock: setup ## pin the dependencies anew in requirements/lock.txt
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --generate-hashes --only-binary :all: \
		--no-annotate --custom-compile-command 'make lock' --extra dev \
		--excludes requirements/torch-excluded.txt --output-file requirements/lock.txt \
		pyproject.toml requirements/torch-needs.txt requirements/setup.txt
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --generate-hashes --only-binary :all: \
		--no-annotate --custom-compile-command 'make lock' --group docs --output-file requirements/docs.txt

clean: ## remove the environment, caches and builds; keeps runs/
	rm -rf .venv .venv-docs build dist site docs/runs.html .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
