# Two commands for a newcomer: `make demo` and `make test`. Both do their own set-up.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo emu emu-data emu-pretrain emu-decoder emu-instruct emu-evaluate \
	transfusion transfusion-train test test-all chaos slurm-test lint format gpu-test gpu-bench clean-demo

export PATH := $(CURDIR)/.venv/bin:$(PATH)
# DeepSpeed's compiled helper: kept in the project, because a stale lock in a shared folder hangs
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.ext
export TOKENIZERS_PARALLELISM ?= false

DEMO_DATA := demo_data
DEMO_RUN := runs/demo
DEMO_DOCUMENTS ?= 24000
# as in: make demo DEMO_OVERRIDES="train.steps=10 schedule.warmup_steps=2"
DEMO_OVERRIDES ?=
# as in: make emu EMU_OVERRIDES="train.steps=20 schedule.warmup_steps=2"
EMU_OVERRIDES ?=
# shapes: two cores, 20 minutes; long: one GPU (DEMO_DOCUMENTS=200000 before the data are drawn)
EMU_SIZE ?= shapes
EMU_RANKS ?= 2
# as in: make transfusion TRANSFUSION_OVERRIDES="train.steps=20 schedule.warmup_steps=2"
TRANSFUSION_OVERRIDES ?=
TRANSFUSION_RANKS ?= 2
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
	@echo "curves       .venv/bin/tensorboard --host localhost --logdir $(DEMO_RUN)/tensorboard"

# two processes share the batch; a run that is complete does nothing when it is started again
TRAIN = command -v nvidia-smi >/dev/null || export DS_ACCELERATOR=cpu; \
	export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(( ($$(nproc) + 1) / 2 ))}; \
	torchrun --nproc-per-node $(1) --master-port $$($(FREE_PORT)) -m mmtrain train

emu: emu-evaluate ## the whole of Emu on coloured shapes: pretrain, decoder, instruct, evaluate (20 minutes on 2 cores)

emu-data: setup
	@test -e $(DEMO_DATA)/tokenizer/tokenizer.json || \
		mmtrain data shapes $(DEMO_DATA) --documents $(DEMO_DOCUMENTS) --seed 0

emu-pretrain: emu-data
	@$(call TRAIN,$(EMU_RANKS)) configs/emu/$(EMU_SIZE)_encoder.yaml $(EMU_OVERRIDES)
	@$(call TRAIN,$(EMU_RANKS)) configs/emu/$(EMU_SIZE)_pretrain.yaml $(EMU_OVERRIDES)

emu-decoder: emu-pretrain
	@test -e runs/$(EMU_SIZE)_latents || \
		python tools/encode_latents.py configs/emu/$(EMU_SIZE)_decoder.yaml runs/$(EMU_SIZE)_latents
	@$(call TRAIN,$(EMU_RANKS)) configs/emu/$(EMU_SIZE)_decoder.yaml $(EMU_OVERRIDES)

emu-instruct: emu-pretrain
	@$(call TRAIN,$(EMU_RANKS)) configs/emu/$(EMU_SIZE)_instruct.yaml $(EMU_OVERRIDES)

emu-evaluate: emu-decoder emu-instruct
	@mmtrain evaluate runs/$(EMU_SIZE)_pretrain
	@mmtrain evaluate runs/$(EMU_SIZE)_instruct
	@mmtrain evaluate runs/$(EMU_SIZE)_decoder
	@mmtrain sample runs/$(EMU_SIZE)_decoder --prompt "a red circle [IMG]" --prompt "two blue squares [IMG]" \
		--prompt "a green cross and a yellow triangle [IMG]" --samples 4
	@mmtrain sample runs/$(EMU_SIZE)_instruct
	@echo
	@echo "figures      runs/$(EMU_SIZE)_{pretrain,instruct,decoder}/evaluation/*.md"
	@echo "pictures     runs/$(EMU_SIZE)_decoder/samples/images.png, runs/$(EMU_SIZE)_instruct/samples/text.png"
	@echo "curves       .venv/bin/tensorboard --host localhost --logdir runs"

transfusion: transfusion-train ## Transfusion on coloured shapes: train, judge captions and pictures, draw (13 minutes on 2 cores)
	@mmtrain evaluate runs/transfusion_shapes
	@mmtrain sample runs/transfusion_shapes --prompt "a red circle [IMG]" --prompt "two blue squares [IMG]" \
		--prompt "a green cross and a yellow triangle [IMG]" --samples 4
	@echo
	@echo "figures      runs/transfusion_shapes/evaluation/*.md"
	@echo "pictures     runs/transfusion_shapes/samples/images.png, runs/transfusion_shapes/evaluation/*.png"
	@echo "while it was trained: runs/transfusion_shapes/samples/step-*.png"
	@echo "curves       .venv/bin/tensorboard --host localhost --logdir runs"

transfusion-train: emu-data
	@$(call TRAIN,$(TRANSFUSION_RANKS)) configs/transfusion/shapes.yaml $(TRANSFUSION_OVERRIDES)

clean-demo: ## remove the demo's data and its runs, and those of `make emu` and `make transfusion`
	rm -rf $(DEMO_DATA) $(DEMO_RUN) runs/transfusion_shapes $(addprefix runs/$(EMU_SIZE)_,encoder pretrain latents decoder instruct)

test: setup ## the CPU test suite
	@python -m pytest

test-all: setup ## the CPU test suite with the slow tests
	@HYPOTHESIS_PROFILE=default python -m pytest -m "not gpu and not slurm"

slurm-test: setup ## jobs under a real Slurm of two nodes on this machine (15 minutes on 2 cores)
	@for command in munged slurmctld slurmd sbatch; do \
		PATH=$$PATH:/usr/sbin command -v $$command >/dev/null || { \
			echo "slurm-test: no $$command here; apt-get install slurm-wlm munge" >&2; exit 66; }; \
	done
	@python -m pytest -m slurm tests/slurm -s

chaos: setup ## kill ranks at 200 random moments and look at what is left
	@python tests/dist/chaos.py $(CHAOS)

lint: setup ## style, types, import floors and known advisories of dependencies
	@ruff check .
	@ruff format --check .
	@mypy
	@lint-imports
	@python tools/audit_dependencies.py

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
