# The only things that a machine needs beforehand are make and Python ≥ 3.11 with venv and pip.
PYTHON ?= python3
EXTRAS ?= test
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALLED := $(VENV)/installed
INSTALLED_TEST := $(VENV)/installed-$(EXTRAS)

# A training that ends in about two minutes on two cores, compilation included.
QUICK := resume=false pool=32 validation=16 assess_every=3 save_every=3 \
	agent.dqn.iterations=3 agent.dqn.target_rate=0.01 agent.practice.clusters=8 \
	agent.practice.requests=2000

OUT ?= outputs/gpu
STAGES ?= calibrate validate live rollout training router
DEVICE ?= cuda
LIVING := gateway worker faults decision
GPU_MODELS ?= [opt-125m,opt-1.3b,opt-6.7b]
CALIBRATE ?= repeat.most=24
VALIDATE ?=
LIVE ?=
VECTOR_CLUSTERS ?= 1024,16384

.DEFAULT_GOAL := help
.PHONY: run test lint bench bench-live gpu gpu-calibrate gpu-validate gpu-live gpu-rollout gpu-training gpu-router clean help

run: $(INSTALLED)  ## train a router, compare it with the others, report
	$(BIN)/python -m agent.train name=quick $(QUICK)
	$(BIN)/python -m agent.evaluate experiment=run

test: lint  ## everything that must hold: lint, types, tests (EXTRAS=test,live,quality,ray,slurm: with the extras)
	$(BIN)/python -m pytest -n auto --dist loadfile --ignore=tests/benchmarks

lint: $(INSTALLED_TEST)  ## style and types only
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(INSTALLED_TEST)  ## how fast the engine is on this machine
	$(BIN)/python -m pytest tests/benchmarks $(LIVING:%=--ignore=tests/benchmarks/test_%.py)

bench-live: $(INSTALLED_TEST)  ## what the gateway costs and endures (EXTRAS=test,live RESULTS=docs/results)
	for part in $(LIVING); do BENCH_COMMAND="make bench-live EXTRAS=test,live" \
		BENCH_JSON=$(if $(RESULTS),$(RESULTS)/$$part.json) \
		$(BIN)/python -m pytest -s tests/benchmarks/test_$$part.py || exit; done

gpu:  ## calibrate, validate, measure, train on a GPU: make gpu PYTHON=python3 (STAGES="...")
	mkdir -p $(OUT)
	for stage in $(STAGES); do $(MAKE) --no-print-directory gpu-$$stage || exit; done

# The stages of `make gpu`, each within nine minutes.
gpu-calibrate:
	timeout 540 $(PYTHON) -m calibrate.run device=$(DEVICE) models=$(GPU_MODELS) \
		out=$(OUT)/bundle $(CALIBRATE); ended=$$?; \
	tar -czf $(OUT)/bundle.tar.gz -C $(OUT) $$(cd $(OUT) && ls -d bundle bundle.run); \
	exit $$ended  # 124: out of time; the same command goes on

gpu-validate:
	timeout 540 $(PYTHON) -m calibrate.validate_bundle device=$(DEVICE) profile=$(OUT)/bundle \
		output_dir=$(OUT)/validation $(VALIDATE) || test $$? -eq 1
	$(PYTHON) -m calibrate.validate_roofline profiles=$(OUT)
	tar -czf $(OUT)/validation.tar.gz -C $(OUT) validation

gpu-live:
	timeout 540 $(PYTHON) -m live.validate mode=gpu device=$(DEVICE) bundle=$(OUT)/bundle \
		output_dir=$(OUT)/live $(LIVE); ended=$$?; \
	tar -czf $(OUT)/live.tar.gz -C $(OUT) live; test $$ended -le 1 -o $$ended -eq 124

gpu-rollout:
	BENCH_JSON=$(OUT)/vector.json VECTOR_CLUSTERS=$(VECTOR_CLUSTERS) \
		timeout 540 $(PYTHON) -m pytest -q tests/benchmarks/test_vector.py

gpu-training:
	BENCH_JSON=$(OUT)/training.json \
		timeout 540 $(PYTHON) -m pytest -q tests/benchmarks/test_training.py

gpu-router:
	timeout --signal=TERM 540 $(PYTHON) -m agent.train name=gpu output_dir=$(OUT)/train \
		agent.practice.clusters=256 agent.dqn.updates=2000 agent.dqn.target_rate=0.00005 || test $$? -eq 124
	tar -czf $(OUT)/train.tar.gz -C $(OUT) train

clean:  ## remove what these commands made, the environment included
	rm -rf $(VENV) build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache \
		.ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
		f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}: make ... PYTHON=python3.12")'
	@$(PYTHON) -c 'import ensurepip, venv' || { \
		echo "$(PYTHON) lacks venv or ensurepip: on Debian, apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e .
	@touch $@

$(INSTALLED_TEST): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[$(EXTRAS)]'
	@touch $@ $(INSTALLED)
