# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test lint types bench clean

demo: .venv/installed
	$(BIN)/stagingd demo

# Deaths are mostly waited for, so they go beside the rest.
test: .venv/installed
	$(BIN)/pytest tests/test_crashes.py > .crashes.log 2>&1 & crashes=$$!; \
	$(BIN)/pytest --ignore=tests/test_crashes.py; rest=$$?; \
	wait $$crashes; deaths=$$?; cat .crashes.log; exit $$((rest + deaths))

lint: .venv/installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: .venv/installed
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python -m benchmarks.host
	$(BIN)/python -m benchmarks.control

# Every package is named with its version in requirements/cpu.txt, so nothing is resolved anew.
.venv/installed: requirements/cpu.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps --requirement requirements/cpu.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch .venv/installed

clean:
	rm -rf .venv
