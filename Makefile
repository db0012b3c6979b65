# The only list of commands. `make quickstart` and `make test` set everything up in .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := runs/quickstart

.PHONY: help quickstart test slow-tests timm-tests ladder-smoke ci lint format types resume-trials install clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

quickstart: install ## trains, compares, fuses, exports, predicts and reports on the built-in digits, in minutes
	$(BIN)/riformer ladder --recipe quickstart --seeds 0 1 2 --jobs 2 --out $(RUNS)
	$(BIN)/riformer fuse $(RUNS)/quickstart-seed0 $(RUNS)/riformer-digits.safetensors
	$(BIN)/riformer export $(RUNS)/quickstart-seed0 $(RUNS)/exported
	$(BIN)/riformer predict $(RUNS)/exported examples/digits --top-k 2
	$(BIN)/riformer report $(RUNS)

test: install ## the tests, in minutes
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow"

slow-tests: install ## what `make test` and `make ci` leave out: large networks, compilers, kills, benchmarks; for a release
	$(BIN)/pytest -n 2 --dist worksteal -m slow

timm-tests: install ## timm's own model tests on these models; fetches timm's source distribution, once
	$(BIN)/python tests/timm_suite.py

ladder-smoke: install ## two rungs and two seeds of a ladder on the built-in digits, and its page, in a minute
	$(BIN)/riformer ladder --recipe quickstart --rungs identity full --seeds 0 1 --jobs 2 --out runs/ladder-smoke \
		--optim.epochs 3 --optim.warmup-epochs 0 --teacher.epochs 3
	$(BIN)/riformer report --ladder runs/ladder-smoke

ci: lint types test ladder-smoke timm-tests ## what a change must pass

lint: install ## style, imports pointing one way, comparisons whose result is dropped
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	@! grep -nE '^\s*(torch|np|numpy)\.(allclose|equal|isclose|array_equal)\(' -r tests

types: install ## static types
	$(BIN)/mypy

format: install ## rewrites the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

resume-trials: install ## kill -9 at random moments, 10 trials with one process and 10 with two
	RESUME_TRIALS=10 $(BIN)/pytest tests/train/test_loop.py -k killed_at_random -v

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -e '.[dev]'
	touch $@

clean: ## removes what was trained and cached, not .venv
	rm -rf runs build .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
