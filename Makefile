# Prism: `make setup`, `make demo`, `make test`, `make lint`.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
# One profile is installed at a time: the one that the mark of a finished setup names, until PROFILE=... changes it.
PROFILE ?= $(or $(patsubst $(VENV)/.ready-%,%,$(firstword $(wildcard $(VENV)/.ready-*))),cpu)
READY = $(VENV)/.ready-$(PROFILE)
BIN := $(VENV)/bin
UV_VERSION := 0.13.9
PARTS := libs/common libs/scheduling libs/cli libs/bench services/gateway services/global_scheduler services/gpu_worker services/model_store
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test test-clients test-compose fuzz test-core explore chaos lint format clean bench-gateway bench-activation bench-decode bench-scheduling bench-calibration

setup: $(READY)

$(READY): requirements/$(PROFILE).lock $(PARTS:%=%/pyproject.toml) Makefile
	@echo "== environment in $(VENV) ($(PROFILE) profile)"
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "prism: $(PYTHON) is not Python 3.11, which the packages are locked for: install python3.11 with" \
		"its venv module (python3.11-venv on Debian and Ubuntu), or name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@echo "== packages (about 5 GB the first time)"
	@rm -f $(VENV)/.ready $(VENV)/.ready-*
	@$(BIN)/uv pip install --python $(BIN)/python --no-deps -r requirements/$(PROFILE).lock
	@echo "== prism itself"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation $(PARTS:%=-e %)
	@touch $@
	@echo "== ready: $(BIN)/prism --help"

demo: setup
	@$(BIN)/prism demo

test: setup
	@$(BIN)/python -m pytest tests --ignore=tests/clients

CLIENTS := build/clients
CLIENTS_LOCKS := tests/clients/clients.lock tests/clients/bench_serving.lock

$(CLIENTS)/.ready: $(CLIENTS_LOCKS) | $(READY)
	@echo "== clients in an environment of their own (0.7 GB beside torch, which setup has fetched)"
	@rm -rf $(CLIENTS)
	@$(BIN)/uv venv --quiet --python $(BIN)/python $(CLIENTS)/clients
	@$(BIN)/uv pip install --quiet --python $(CLIENTS)/clients/bin/python --no-deps -r tests/clients/clients.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target $(CLIENTS)/bench-serving-packages \
		-r tests/clients/bench_serving.lock
	@touch $@

test-clients: setup $(CLIENTS)/.ready
	@$(BIN)/python -m pytest tests/clients

# The stack of deploy/compose on a Docker engine; what it keeps for the next run is in build/compose, or where
# PRISM_COMPOSE_CACHE says.
test-compose: setup
	@$(BIN)/python -m tests.compose

fuzz: setup
	@PRISM_FUZZ_CASES=$${CASES:-10000} PRISM_FUZZ_SEED=$${SEED:-$$(date +%s)} $(BIN)/python -m pytest tests/fuzz -q -s

test-core: setup
	@for run in 1 2 3 4 5; do $(BIN)/python -m pytest tests --ignore=tests/clients -q -m core || exit 1; done

# Property tests on examples of chance: what fails becomes a test of its own.
RUNS ?= 10

explore: setup
	@for run in $$(seq $(RUNS)); do \
		$(BIN)/python -m pytest tests/scheduling tests/gateway tests/common tests/model_store tests/bench -q -m core \
			--hypothesis-profile=exploring || exit 1; done

SEED ?= 1

chaos: setup
	@$(BIN)/python -m tests.chaos --seed $(SEED)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

PEERS := build/bench-peers
PEERS_LOCK := libs/bench/prism/bench/gateway/requirements.lock

$(PEERS)/.ready: $(PEERS_LOCK) | $(READY)
	@echo "== LiteLLM and SGLang's router in an environment of their own (0.7 GB)"
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(PEERS)
	@$(BIN)/uv pip install --quiet --python $(PEERS)/bin/python --no-deps -r $(PEERS_LOCK)
	@touch $@

bench-gateway: setup $(PEERS)/.ready
	@$(BIN)/python -m prism.bench.gateway --peers $(PEERS)/bin/python

# On a GPU host (docs/gpu.md), with the cells that there is time for; `merge` makes one file of several runs.
ACTIVATION_CELLS := wake_small wake_14b freeze_8b staged_8b cold_start stage_8b cycles wake_32b wake_70b_fp8
bench-activation: CELLS = $(ACTIVATION_CELLS)
bench-activation: setup
	@$(BIN)/python -m prism.bench.activation cell $(CELLS)
	@$(BIN)/python -m prism.bench.activation merge $(CELLS:%=build/bench-activation/%.json)

# Beside plain SGLang; CELLS=decode_tiny tries it on a CPU.
DECODE_CELLS := decode_1b decode_8b colocated colocated_mps moving_kv
bench-decode: CELLS = $(DECODE_CELLS)
bench-decode: setup
	@$(BIN)/python -m prism.bench.decode cell $(CELLS)
	@$(BIN)/python -m prism.bench.decode merge $(CELLS:%=build/bench-decode/%.json)

# In the simulator; what is done is kept in build/bench-scheduling, so that a run that was stopped goes on.
SEEDS ?= 10
bench-scheduling: setup
	@$(BIN)/python -m prism.bench.scheduling --seeds $(SEEDS)

# The simulator against a real worker on this machine's CPU, or its GPU (DEVICE=cuda).
DEVICE ?= cpu
bench-calibration: setup
	@$(BIN)/python -m prism.bench.calibration --device $(DEVICE)

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
