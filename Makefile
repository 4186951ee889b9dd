# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test lint types bench clean

demo: .venv/installed
	$(BIN)/stagingd demo

# What is mostly waited for goes beside the rest: deaths, and engines that import and start.
BESIDE := tests/test_crashes.py tests/test_demo.py tests/test_vllm_engine.py tests/test_vllm_fp8_engine.py \
	tests/test_vllm_server.py tests/test_async_engine.py tests/test_weight_transfer.py tests/test_attachment.py \
	tests/test_exactness_of_models.py tests/test_plans_of_models.py tests/test_plan_command.py

test: .venv/installed
	$(BIN)/pytest $(BESIDE) > .beside.log 2>&1 & beside=$$!; \
	$(BIN)/pytest $(BESIDE:%=--ignore=%); rest=$$?; \
	wait $$beside; status=$$?; cat .beside.log; exit $$((rest + status))

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
