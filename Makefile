# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3.11
BIN := .venv/bin

# Else Python would compile what it imports again in every process that a test starts (see .venv/installed).
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint types docs bench clean

demo: .venv/installed
	$(BIN)/stagingd demo

# Deaths are mostly waited for, and engines mostly import and start, so they go beside the rest. What is compared model by
# model, and some engines, follow the deaths: the three then take about as long.
DEATHS := tests/test_crashes.py tests/test_exactness_of_models.py tests/test_plans_of_models.py \
	tests/test_plan_command.py tests/test_benchmark_flush.py tests/test_attachment.py \
	tests/test_quantization_error.py tests/test_computed.py tests/test_torchao.py tests/test_documents.py
ENGINES := tests/test_demo.py tests/test_vllm_fp8_engine.py tests/test_vllm_engine.py tests/test_vllm_server.py tests/test_async_engine.py \
	tests/test_engines_die_and_join.py tests/test_weight_transfer.py tests/test_benchmark_compare_run.py \
	tests/test_benchmark_compare_systems.py tests/test_benchmark_compare_trainers.py
BESIDE := $(DEATHS) $(ENGINES)

# One thread each: threads that wait for each other on busy cores take a hundred times as long.
test: export OMP_NUM_THREADS = 1
test: .venv/installed
	$(BIN)/pytest $(DEATHS) > .deaths.log 2>&1 & deaths=$$!; \
	$(BIN)/pytest $(ENGINES) > .engines.log 2>&1 & engines=$$!; \
	$(BIN)/pytest $(BESIDE:%=--ignore=%); failed=$$?; \
	wait $$deaths || failed=1; wait $$engines || failed=1; cat .deaths.log .engines.log; exit $$failed

lint: .venv/installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: .venv/installed
	$(BIN)/mypy

# Pages for browsers, and the manual page. What is warned of is an error.
SPHINX := $(BIN)/sphinx-build --quiet --fail-on-warning --doctree-dir docs/_build/doctrees
docs: .venv/installed
	$(SPHINX) --builder html docs docs/_build/html
	$(SPHINX) --builder man docs docs/_build/man

bench: .venv/installed
	$(BIN)/python -m benchmarks.host
	$(BIN)/python -m benchmarks.control

# Every package is named with its version in requirements/cpu.txt, so nothing is resolved anew. Python compiles what it
# imports; to compile all of torch and vLLM beforehand would take as long as to install them.
.venv/installed: requirements/cpu.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps --no-compile --requirement requirements/cpu.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch .venv/installed

clean:
	rm -rf .venv docs/_build docs/commands
