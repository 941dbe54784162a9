# Two commands for a newcomer: `make demo` and `make test`. Both do their own set-up.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format gpu-test gpu-bench clean-demo

export PATH := $(CURDIR)/.venv/bin:$(PATH)
# DeepSpeed's compiled helper: kept in the project, because a stale lock in a shared folder hangs
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.ext
export TOKENIZERS_PARALLELISM ?= false

DEMO_DATA := demo_data
DEMO_RUN := runs/demo
DEMO_DOCUMENTS ?= 12000
# as in: make demo DEMO_OVERRIDES="train.steps=10 schedule.warmup_steps=2"
DEMO_OVERRIDES ?=
# the launcher's default port may belong to another run on this machine
FREE_PORT := python -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'
HAS_GPU := python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: ## make .venv and install the project into it
	@.ci/setup

demo: setup ## write demo data, train an Emu on two processes, sample from it (5 minutes on 2 cores)
	@test -e $(DEMO_DATA)/tokenizer/tokenizer.json || \
		mmtrain data shapes $(DEMO_DATA) --documents $(DEMO_DOCUMENTS) --seed 0
	@command -v nvidia-smi >/dev/null || export DS_ACCELERATOR=cpu; \
		export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(( ($$(nproc) + 1) / 2 ))}; \
		deepspeed --log_level error --num_gpus 2 --master_port $$($(FREE_PORT)) \
		--module mmtrain train configs/emu/demo.yaml $(DEMO_OVERRIDES)
	@mmtrain evaluate $(DEMO_RUN)
	@mmtrain sample $(DEMO_RUN)
	@echo
	@echo "data         $(DEMO_DATA)/"
	@echo "run          $(DEMO_RUN)/  (recipe.yaml, metrics.jsonl, checkpoints/, log.txt)"
	@echo "pictures     $(DEMO_RUN)/samples/"
	@echo "curves       .venv/bin/tensorboard --logdir $(DEMO_RUN)/tensorboard"

clean-demo: ## remove the demo's data and run
	rm -rf $(DEMO_DATA) $(DEMO_RUN)

test: setup ## the CPU test suite
	@python -m pytest

test-all: setup ## the CPU test suite with the slow tests
	@python -m pytest -m "not gpu"

lint: setup ## style, types and import floors
	@ruff check .
	@ruff format --check .
	@mypy
	@lint-imports

format: setup ## apply the style
	@ruff check --fix .
	@ruff format .

gpu-test: setup ## tests that need a CUDA device
	@if ! $(HAS_GPU); then \
		echo "gpu-test: no CUDA device here, nothing was tested"; \
	elif ! python -m pytest -m gpu --collect-only -q >/dev/null; then \
		echo "gpu-test: no test is marked gpu yet, nothing was tested"; \
	else \
		python -m pytest -m gpu; \
	fi

gpu-bench: setup ## speed of the CUDA kernels
	@if ! $(HAS_GPU); then \
		echo "gpu-bench: no CUDA device here, nothing was measured"; \
	elif ! compgen -G 'kernels/bench/*.py' >/dev/null; then \
		echo "gpu-bench: kernels/bench holds no benchmark yet, nothing was measured"; \
	else \
		for bench in kernels/bench/*.py; do python "$$bench"; done; \
	fi
