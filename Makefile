# The environment is made on first use and again when pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV ?= .venv
SITE ?= site
# Processes of pytest, with one thread each: two suit a small machine.
WORKERS ?= 2
# Extra arguments, e.g. make test ARGS="tests/contract -k ema".
ARGS ?=
DEMO ?= recipes/mnist1d/noisy_labels.yaml

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

.PHONY: env
env: $(STAMP) ## Make the environment in VENV (.venv)

.PHONY: demo
demo: $(STAMP) ## Compare the objectives on MNIST-1D with 40 % label noise
	OMP_NUM_THREADS=1 $(BIN)/lightning-aux compare --config $(DEMO) $(ARGS)

.PHONY: test
test: $(STAMP) ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

THIRD_PARTY := .venv-third-party

$(THIRD_PARTY)/.installed: pyproject.toml constraints.txt constraints-third-party.txt
	$(PYTHON) -m venv $(THIRD_PARTY)
	$(THIRD_PARTY)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -c constraints-third-party.txt -e '.[dev,third-party]'
	@touch $@

.PHONY: test-third-party
test-third-party: $(THIRD_PARTY)/.installed ## Attach to modules that other packages ship (own environment)
	OMP_NUM_THREADS=1 $(THIRD_PARTY)/bin/python -m pytest -n $(WORKERS) tests/third_party $(ARGS)

.PHONY: lint
lint: $(STAMP) ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict

.PHONY: format
format: $(STAMP) ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: docs
docs: $(STAMP) ## Build the documentation into site/, warnings being errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir $(abspath $(SITE))

.PHONY: support
support: $(STAMP) ## Write docs/support.md from a run of the contract suite
	$(MAKE) --no-print-directory test ARGS="tests/contract --support-matrix docs/support.md $(ARGS)"

.PHONY: mutations
mutations: $(STAMP) ## Break every promise once and write docs/mutations.md
	WORKERS=$(WORKERS) $(BIN)/python -m tests.mutations

.PHONY: bench-weights
bench-weights: $(STAMP) ## Measure updates of averages beside other libraries; writes docs/benchmarks.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.weights

.PHONY: bench-divergences
bench-divergences: $(STAMP) ## Measure divergences beside plain torch; writes docs/divergences.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.divergences --write

.PHONY: bench
bench: $(STAMP) ## Measure what attaching costs per step, one process at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/benchmarks $(ARGS)

.PHONY: notebook
notebook: $(STAMP) ## Run the notebook of the documentation and store its outputs
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.docs.notebook

.PHONY: evidence
evidence: $(STAMP) ## Train the comparisons of docs/evidence.md (half an hour) and write the page
	OMP_NUM_THREADS=1 $(BIN)/python -m recipes.evidence --train

.PHONY: clean
clean: ## Remove the environment, the built site and the tools' caches
	rm -rf .venv $(THIRD_PARTY) site build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
