# Everything runs in .venv, which is made from uv.lock on first use. PYTHON=python3.13 make … chooses another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory --no-builtin-rules
export SAM_CLI_TELEMETRY := 0
export AUTH_MODE QAES_PORT QAES_HTTP_PORT SAM_LOCAL_ARGS TASK ROLE SUBJECT HANDLER ACTION EFFECTS CALLBACK CREDENTIAL

.PHONY: help demo up down status logs token fsck check-handler test e2e browser sam-local check openapi fuzz format requirements bench load-test hammer clean

help:  ## This list
	@awk -F ' ## ' '/^[a-z0-9-]+:.* ## / { name = $$1; sub(/:.*/, "", name); printf "make %-14s %s\n", name, $$2 }' $(firstword $(MAKEFILE_LIST))

# --- the environment: runtime and local cloud for `demo` and `up`, every group for all else

$(BIN)/uv:
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed; $(PYTHON) is not installed. PYTHON=/path/to/python3 make … chooses one." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || { echo "Python 3.11 to 3.14 is needed; $(PYTHON) is $$($(PYTHON) -V 2>&1). PYTHON=/path/to/python3.13 make … chooses another." >&2; exit 1; }
	@echo "making .venv with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) -m venv does not work (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.8,<1'

$(VENV)/.local-stamp: $(BIN)/uv pyproject.toml uv.lock
	@echo "installing what the local cloud needs"
	@UV_PROJECT_ENVIRONMENT=$(VENV) $(BIN)/uv sync --quiet --frozen --inexact --no-default-groups --group local
	@touch $@

$(VENV)/.all-stamp: $(BIN)/uv pyproject.toml uv.lock
	@echo "installing the tools for tests and checks"
	@UV_PROJECT_ENVIRONMENT=$(VENV) $(BIN)/uv sync --quiet --frozen --all-groups
	@touch $@ $(VENV)/.local-stamp

# --- the local cloud

demo: $(VENV)/.local-stamp ## Run a monitoring task and an approved transfer on a separate local AWS, and check them
	@$(BIN)/python -m local demo

up: $(VENV)/.local-stamp ## Start the local cloud, API at http://localhost:8000 (AUTH_MODE=stub: without tokens)
	@$(BIN)/python -m local up

# On a fresh clone nothing runs: report this without an installation.
NOT_RUNNING := The local cloud does not run. Start it with: make up
IF_INSTALLED := [ -x $(BIN)/python ] && [ -f $(VENV)/.local-stamp ] || { echo "$(NOT_RUNNING)" >&2; exit 1; };

down: ## Stop the local cloud, and remove its files and those of interrupted runs
	@if [ -f $(VENV)/.local-stamp ]; then $(BIN)/python -m local down; else echo "$(NOT_RUNNING)"; fi

status: ## Show whether the local cloud runs (exit status 0 if it does)
	@$(IF_INSTALLED) $(BIN)/python -m local status

logs: ## Print the logs of the local cloud's services (TASK=task_…: of one task; ALL=1: Lambda's lines too)
	@$(IF_INSTALLED) $(BIN)/python -m local logs --task "$$TASK" $(if $(ALL),--all)

token: ## Print a token of the running local cloud (ROLE=operator SUBJECT=oscar)
	@$(IF_INSTALLED) $(BIN)/python -m local token --role "$$ROLE" --subject "$$SUBJECT"

fsck: ## Check the audit log of the running local cloud, every entry, tile and anchor (REPAIR=1)
	@test -f .local/aws.env || { echo "$(NOT_RUNNING)" >&2; exit 1; }
	@$(IF_INSTALLED) source .local/aws.env && PYTHONPATH=functions:layers/core $(BIN)/python -m local.fsck $(if $(REPAIR),--repair)

check-handler: $(VENV)/.all-stamp ## Check that an action's handler keeps the contract (HANDLER=url|function ACTION=folder)
	@PYTHONPATH=functions:layers/core $(BIN)/python -m local.check_handler

# --- tests and checks

test: $(VENV)/.all-stamp ## Unit, handler and workflow tests, on moto, with coverage
	@mkdir -p .local
	@$(BIN)/python -m pytest -q -n auto --dist loadgroup --ignore=tests/e2e --ignore=tests/browser --ignore=tests/sam_local --cov --cov-report=term

e2e: $(VENV)/.all-stamp ## The deployed template on a local AWS, with IAM enforced
	@$(BIN)/python -m pytest -q tests/e2e

browser: $(VENV)/.all-stamp ## The pages in Chromium, on a phone's and a desktop's window (CHROMIUM=/path/to/it)
	@[ -n "$${CHROMIUM:-$$(command -v chromium || command -v chromium-browser)}" ] || { echo "make browser is skipped: there is no chromium here (Debian: apt install chromium)"; exit 0; }; \
	$(BIN)/python -m pytest -q tests/browser

sam-local: $(VENV)/.all-stamp ## The functions in Lambda's container, through `sam local` (needs Docker; SAM_LOCAL_ARGS)
	@$(BIN)/python -m pytest -q tests/sam_local

check: $(VENV)/.all-stamp ## Lint, types, import contracts, template, requirements, prose: changes nothing
	@mkdir -p .local
	@echo "ruff" && $(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet .
	@echo "mypy" && $(BIN)/mypy --no-error-summary
	@echo "import contracts" && PYTHONPATH=functions:layers/core $(BIN)/lint-imports --no-logo > .local/import-linter.log || { cat .local/import-linter.log; exit 1; }
	@echo "cfn-lint" && $(BIN)/cfn-lint --append-rules cfn_lint_serverless.rules && $(BIN)/cfn-lint -t examples/*/template.yaml
	@echo "sam validate" && AWS_DEFAULT_REGION=us-east-1 AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test $(BIN)/sam validate --lint > .local/sam-validate.log 2>&1 || { cat .local/sam-validate.log; exit 1; }
	@echo "checkov" && $(BIN)/checkov --config-file .checkov.yaml > .local/checkov.log || { cat .local/checkov.log; exit 1; }
	@echo "openapi" && PYTHONPATH=functions:layers/core $(BIN)/python -m local.openapi --check
	@echo "reference" && PYTHONPATH=functions:layers/core $(BIN)/python -m local.reference --check
	@echo "prose" && $(BIN)/python -m local.prose
	@echo "uv.lock and the layer's requirements" && $(BIN)/uv lock --check --quiet && $(EXPORT) | diff - layers/core/requirements.txt || { echo "layers/core/requirements.txt differs from uv.lock: make requirements" >&2; exit 1; }

EXPORT := $(BIN)/uv export --quiet --frozen --no-dev --no-emit-project --no-header --format requirements.txt

requirements: $(VENV)/.all-stamp ## Write layers/core/requirements.txt from uv.lock
	@$(EXPORT) > layers/core/requirements.txt

fuzz: $(VENV)/.all-stamp ## All that make test samples; then some 10,000 requests made from the API's document (half an hour)
	@QAES_FUZZ=1 $(BIN)/python -m pytest -q tests/unit/test_attacks.py tests/unit/test_verifier_search.py tests/handlers/test_audit_crashes.py tests/handlers/test_transaction_worker.py
	@QAES_FUZZ=500 $(BIN)/python -m pytest -q tests/e2e/test_schemathesis.py

openapi: $(VENV)/.all-stamp ## Write the parts of the documentation that come from code: API, parameters, state machine
	@PYTHONPATH=functions:layers/core $(BIN)/python -m local.openapi
	@PYTHONPATH=functions:layers/core $(BIN)/python -m local.reference

format: $(VENV)/.all-stamp ## Format code, apply the fixes of ruff, wrap the documentation
	@$(BIN)/ruff check --quiet --fix . && $(BIN)/ruff format --quiet . && $(BIN)/python -m local.prose --write

bench: $(VENV)/.all-stamp ## Measure; writes docs/performance.md and .json (ONLY=imports, cost, window, growth, memory: that section; ONLY=compare BEFORE=/a/checkout)
	@PYTHONPATH=functions:layers/core $(BIN)/python -m benchmarks.run $(ONLY)

load-test: $(VENV)/.all-stamp ## Load the audit log of a separate local AWS, verify every proof, print figures (LOAD_TEST_ARGS)
	@PYTHONPATH=functions:layers/core $(BIN)/python -m benchmarks.load_test $(LOAD_TEST_ARGS)

hammer: load-test

clean: ## Remove builds, installations and logs
	@if [ -x $(BIN)/python ] && [ -f .local/cloud/lock ]; then $(BIN)/python -m local down; fi
	@rm -rf $(VENV) .local .aws-sam .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
