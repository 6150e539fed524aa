# CLIP-Ray's commands; `make help` lists them. Works with GNU make 3.81 and any POSIX shell.

VENV ?= .venv
export PYTHON
BIN := $(VENV)/bin
STORAGE ?= runs
# Another package index for torch, e.g. https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
TORCH_PIN := $(shell grep '^torch==' constraints.txt)
NOT_SELECTED := not slow and not chaos and not bench and not gpu
# Groups of tests that run beside the others; threads of theirs that wait leave the cores to them.
TRAINING := tests/runtime/test_pretrain.py tests/train
SERVERS := tests/serve tests/cluster tests/registry tests/test_registry.py
SERVERS += tests/runtime/test_jobs.py tests/runtime/test_stop.py
ENDINGS := $(addprefix tests/chaos/test_,attempts.py data_faults.py soak.py)
# Alone: what they measure is promised of two cores with nothing beside.
NODES := $(addprefix tests/chaos/test_,elastic.py zombies.py head.py::test_calls_that_fail)

.PHONY: help install quickstart serve serve-down cluster-up cluster-down package test test-slow test-gpu chaos lint format ui bench clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' Makefile | sed -e 's/:.*##/:/' | awk -F': *' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed  ## create .venv and install everything

$(VENV)/.installed: pyproject.toml constraints.txt
	@sh .ci/make-venv.sh $(VENV)
	@if [ -n "$(TORCH_INDEX)" ]; then $(BIN)/python -m pip install -q --index-url $(TORCH_INDEX) $(TORCH_PIN); fi
	@echo "installing (a few minutes, once)"
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	@touch $@

# What a make command needs to find the same runs again.
MORE := $(if $(filter-out runs,$(STORAGE)), STORAGE=$(STORAGE))

quickstart: install  ## pre-train, evaluate and promote a small CLIP on the bundled data
	@$(BIN)/python jobs/pretrain.py --run.storage $(STORAGE)
	@$(BIN)/python jobs/promote.py --model quickstart --storage $(STORAGE)
	@echo
	@echo "next:"
	@echo "  make serve$(MORE)                                              serve it: demo page, API"
	@echo "  make ui$(MORE)                                                 browse the run in MLflow"
	@echo "  $(BIN)/python jobs/pretrain.py --run.storage $(STORAGE) --run.extend 200   go on from where it ended"
	@echo "  $(BIN)/python jobs/prepare.py --help                     make shards of your own pictures"
	@echo "  $(BIN)/python jobs/evaluate.py --model $(STORAGE)/quickstart --dataset $(STORAGE)/bundled/starter"
	@echo "  README.md, \"Your own data\" and \"On a cluster\""

# More flags, e.g. SERVE="--serve.port 8001"
SERVE ?=

serve: install  ## serve the champion to this machine, on port 8000 (SERVE="--serve.port 8001")
	@$(BIN)/python jobs/deploy.py --profile local --storage $(STORAGE) $(SERVE)

serve-down: install  ## end what make serve started, from another terminal
	@$(BIN)/python jobs/deploy.py --down --storage $(STORAGE)

N ?= 3
CPUS ?= 2
GPUS ?= 0
# Its state and logs; several clusters stand side by side in several folders.
CLUSTER ?= runs/cluster

cluster-up: install  ## a Ray of several nodes on this machine (N=3 CPUS=2 GPUS=0, as declared)
	@$(BIN)/python cluster/local.py up --nodes $(N) --cpus $(CPUS) --gpus $(GPUS) --folder $(CLUSTER)

cluster-down: install  ## end that one, and no other Ray
	@$(BIN)/python cluster/local.py down --folder $(CLUSTER)

package: install  ## the code as a zip for working_dir, for clusters without our image (DEST=...)
	@$(BIN)/python cluster/package.py --dest "$(DEST)"

test: install  ## unit and Ray integration tests (meant for 15 minutes on 2 cores)
	@OMP_WAIT_POLICY=passive sh .ci/side-by-side.sh \
	"$(BIN)/python -m pytest -m '$(NOT_SELECTED)' --durations=15" \
	"$(TRAINING)" "$(SERVERS)" "$(addprefix --ignore=,$(TRAINING) $(SERVERS))"

test-slow: install  ## the tests that take minutes each
	@$(BIN)/python -m pytest -m "slow"

chaos: install  ## faults on real clusters of this machine: killed, stopped, drained, unreachable (meant for 30 minutes)
	@status=0; chaos="$(BIN)/python -m pytest -m chaos --durations=0 --durations-min=1"; \
	export CHAOS_UNDISTURBED=$$(mktemp -d); \
	$$chaos $(NODES) || status=1; \
	sh .ci/side-by-side.sh "$$chaos" "$(ENDINGS)" \
	"$(patsubst %,--deselect=%,$(NODES) $(ENDINGS)) tests/chaos" || status=1; \
	rm -r "$$CHAOS_UNDISTURBED"; exit $$status

test-gpu: install  ## the tests that need a CUDA device
	@$(BIN)/python -m pytest -m "gpu" -rs

lint: install  ## ruff and mypy
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: install  ## let ruff rewrite the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

ui: install  ## the MLflow UI on a free loopback port (STORAGE=runs)
	@$(BIN)/python jobs/ui.py --storage $(STORAGE)

bench: install  ## the benchmarks; prints tables of ratios
	@$(BIN)/python -m pytest -m bench -s tests/benchmarks

clean:  ## remove .venv and caches; runs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
