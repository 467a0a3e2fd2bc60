# make help lists the targets. Set-up happens on demand, in .venv; `VENV=` uses PYTHON as it is, without installing
# anything, for machines that bring their own torch: make demo VENV= PYTHON=python3

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
SUITE ?= cpu
BENCH_ARGS ?=

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY :=
export PYTHONPATH := $(CURDIR)/src:$(CURDIR)/dropin/src$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

# Two processes of one thread each beat one of two threads: the Triton interpreter is bound by Python.
CPU_TESTS := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 TRITON_INTERPRET
# These run kernels, so on a CPU they need the interpreter; the others need it off, some of them to compile kernels.
INTERPRETED := $(wildcard tests/numerics tests/fused)

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format test-gpu bench readme clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(READY) ## create .venv with the pinned tools and both distributions (the other targets do it when needed)

$(VENV)/.ready: requirements-dev.txt requirements-triton.txt pyproject.toml dropin/pyproject.toml
	@echo "setting up $(VENV); PyTorch is large, so this takes a minute or more"
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements-dev.txt
	$(PY) -c "import triton" 2>/dev/null || $(PY) -m pip install --quiet -r requirements-triton.txt
	$(PY) -m pip install --quiet -e . -e ./dropin
	touch $@

demo: $(READY) ## train a small GPT on this device, compare with standard attention, plot into demo-results/
	$(PY) -m demo

test: $(READY) ## every test that needs no GPU: the kernels run under Triton's interpreter
	@status=0; \
	$(CPU_TESTS)=1 $(PY) -m pytest $(INTERPRETED) -n 2 $(PYTEST_ARGS) || status=1; \
	$(CPU_TESTS)=0 $(PY) -m pytest tests $(addprefix --ignore=,$(INTERPRETED)) -n 2 $(PYTEST_ARGS) || status=1; \
	exit $$status

check: $(READY) ## formatting, lint, types, import direction and size budgets
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/architecture/test_layers.py tests/architecture/test_source.py

format: $(READY) ## write what `check` would complain about in formatting and lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

test-gpu: $(READY) ## the same tests on the GPU's own kernels
	$(PY) -m pytest tests $(PYTEST_ARGS)

bench: $(READY) ## measure: SUITE=cpu (default), gpu or fused, with BENCH_ARGS; results go into benchmarks/results
	$(PY) -m benchmarks.$(SUITE) $(BENCH_ARGS)

readme: $(READY) ## regenerate the README's tables from benchmarks/results
	$(PY) tools/readme_tables.py

clean: ## remove .venv and everything generated
	rm -rf $(VENV) build dist demo-results .pytest_cache .ruff_cache .mypy_cache src/*.egg-info dropin/src/*.egg-info
