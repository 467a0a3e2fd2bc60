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
DOCS_READY :=
export PYTHONPATH := $(CURDIR)/src:$(CURDIR)/dropin/src$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready
endif

# Two processes of one thread each beat one of two threads: the Triton interpreter is bound by Python.
CPU_TESTS := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 TRITON_INTERPRET
# These run kernels, so on a CPU they need the interpreter; the others need it off, some of them to compile kernels.
INTERPRETED := $(wildcard tests/numerics tests/fused)

# Other projects' programs live in an environment of their own, two more versions of transformers in folders of it.
ECOSYSTEM := .venv-ecosystem
ECOSYSTEM_PY := $(CURDIR)/$(ECOSYSTEM)/bin/python
ECOSYSTEM_TEST := FLASH_ATTENTION_PLUS_ECOSYSTEM=1 HF_HUB_OFFLINE=1 $(CPU_TESTS)=0
ECOSYSTEM_ARGS := -n 2 --dist loadfile $(PYTEST_ARGS)
ECOSYSTEM_REQUIREMENTS := requirements-ecosystem.txt $(wildcard tests/ecosystem/*.txt)
HF_TESTS := $(wildcard tests/ecosystem/test_transformers*.py) tests/models/test_against_transformers.py

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format test-gpu memcheck test-ecosystem bench readme docs clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

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

# Without PyTorch's own pool, so that what lies behind a tensor is nobody's.
memcheck: $(READY) ## a sample of the GPU tests under NVIDIA's compute-sanitizer
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 --kernel-name kns=attention \
		$(PY) -m pytest -q -x tests/numerics/test_attention_reference.py $(PYTEST_ARGS) \
		-k "bfloat16 and (triton or gluon) and test_dense and (causal_tall or layout_sliced or head_dim_40 or window_both)"

$(ECOSYSTEM)/.ready: requirements-dev.txt requirements-triton.txt $(ECOSYSTEM_REQUIREMENTS) dropin/pyproject.toml
	@echo "setting up $(ECOSYSTEM); other projects' packages are many, so this takes some minutes"
	test -x $(ECOSYSTEM_PY) || $(PYTHON) -m venv $(ECOSYSTEM)
	$(ECOSYSTEM_PY) -m pip install --quiet -r requirements-dev.txt -r requirements-ecosystem.txt
	$(ECOSYSTEM_PY) -c "import triton" 2>/dev/null || $(ECOSYSTEM_PY) -m pip install --quiet -r requirements-triton.txt
	$(ECOSYSTEM_PY) -m pip install --quiet -e . -e ./dropin
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
		$(ECOSYSTEM_PY) -m pip install --quiet --no-deps --no-build-isolation -r tests/ecosystem/programs.txt
	for name in transformers-4 transformers-kernels; do \
		$(ECOSYSTEM_PY) -m pip install --quiet --no-deps --upgrade --target $(ECOSYSTEM)/$$name \
			-r tests/ecosystem/$$name.txt || exit 1; \
	done
	touch $@

test-ecosystem: $(ECOSYSTEM)/.ready ## real programs that import flash_attn, on the CPU, in .venv-ecosystem
	@status=0; \
	PYTHONPATH= $(ECOSYSTEM_TEST) $(ECOSYSTEM_PY) -m pytest tests/ecosystem tests/models/test_against_transformers.py \
		tests/dropin/test_packaging.py::test_the_libraries_own_check --ignore=tests/ecosystem/test_ring_flash_attn.py \
		--ignore=tests/ecosystem/test_local_kernels.py $(ECOSYSTEM_ARGS) || status=1; \
	PYTHONPATH=$(CURDIR)/$(ECOSYSTEM)/transformers-4 $(ECOSYSTEM_TEST) $(ECOSYSTEM_PY) -m pytest $(HF_TESTS) \
		tests/ecosystem/test_ring_flash_attn.py $(ECOSYSTEM_ARGS) || status=1; \
	PYTHONPATH=$(CURDIR)/$(ECOSYSTEM)/transformers-kernels $(ECOSYSTEM_TEST) $(ECOSYSTEM_PY) -m pytest \
		tests/ecosystem/test_local_kernels.py $(PYTEST_ARGS) || status=1; \
	exit $$status

bench: $(READY) ## measure: SUITE=cpu (default), gpu, hopper, decode or fused, with BENCH_ARGS; results go into benchmarks/results
	$(PY) -m benchmarks.$(SUITE) $(BENCH_ARGS)

readme: $(READY) ## regenerate the tables of both READMEs from benchmarks/results and the support matrix
	$(PY) -m tools.readme_tables

docs: $(DOCS_READY) ## build the documentation into site/, with tables and plots from benchmarks/results
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

$(VENV)/.docs-ready: $(READY) requirements-docs.txt
	$(PY) -m pip install --quiet -r requirements-docs.txt
	touch $@

clean: ## remove .venv, .venv-ecosystem and everything generated
	rm -rf $(VENV) $(ECOSYSTEM) build dist site demo-results .pytest_cache .ruff_cache .mypy_cache src/*.egg-info dropin/src/*.egg-info
