# One command each; `make help` lists them. Each sets up what it needs first.

# An active virtual environment is used as it is; otherwise `make` makes .venv here.
ifdef VIRTUAL_ENV
VENV := $(VIRTUAL_ENV)
else
VENV := .venv
endif
PYTHON := $(VENV)/bin/python
# torchrun, which ends without a traceback of its own where a rank has said why it ended, and on Ctrl-C.
TORCHRUN := $(PYTHON) -m gloria.dist.torchrun --standalone
READY := $(VENV)/.gloria-ready

# Ranks on this machine: GPUs where there are some, else two processes sharing the cores.
NPROC ?= $(shell nvidia-smi -L 2>/dev/null | grep -c . | sed 's/^0$$/2/')
CONFIG ?= launch/demo.toml
RECIPE ?= launch/sample.toml
RUN ?= runs/demo
OUT ?= runs/$(TASK)-$(subst /,-,$(patsubst runs/%,%,$(patsubst models/%,%,$(MODEL:/=))))
TASK ?= assin2
MODEL ?= models/demo
ARGS ?=
SRUN ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-hard lint corpus pretrain finetune evaluate tensorboard bench clean slurm-check slurm-test

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 14

setup: $(READY) ## virtual environment with everything installed

$(READY): requirements.txt pyproject.toml
	@test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --requirement requirements.txt
	$(PYTHON) -m pip install --quiet --editable '.[test,parquet,data,lora]'
	@touch $@

demo: $(READY) ## sample corpus -> pre-training -> Hugging Face folder -> a generated paragraph (CPU, minutes)
	$(PYTHON) -m gloria.prepare launch/sample.toml
	$(TORCHRUN) --nproc_per_node $(NPROC) -m gloria.pretrain --config launch/demo.toml $(ARGS)
	rm -rf models/demo
	$(PYTHON) -m gloria.export --run runs/demo --out models/demo
	$(PYTHON) -m gloria.generate --model models/demo --prompt "A cortiça" --max-new-tokens 80 --temperature 0.8 --seed 1

test: $(READY) ## the whole test suite (two cores, no GPU)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist worksteal $(ARGS)

test-hard: $(READY) ## the suite on one core, under load, on older kernels, in random orders (an hour): ARGS="one-core load+order-1"
	$(PYTHON) -m tests.hard $(ARGS)

lint: $(READY) ## style, format (ruff) and types (mypy)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

corpus: $(READY) ## clean text (where the recipe has [refine]), then token shards, from a corpus recipe: RECIPE=corpus.toml
	$(if $(shell grep -s '^ *\[refine\]' $(RECIPE)),$(PYTHON) -m gloria.refine $(RECIPE))
	$(PYTHON) -m gloria.prepare $(RECIPE) $(ARGS)

pretrain: $(READY) ## pre-train on this machine: CONFIG=launch/gloria-1.3b.toml NPROC=4 ARGS="--train.steps 100"
	$(TORCHRUN) --nproc_per_node $(NPROC) -m gloria.pretrain --config $(CONFIG) $(ARGS)

finetune: $(READY) ## fine-tune on a task: TASK=assin2 MODEL=models/demo DATA=folder (else a small sample) OUT=runs/NAME ARGS="--train.epochs 3"
	$(TORCHRUN) --nproc_per_node $(NPROC) -m gloria.finetune --task $(TASK) --model $(MODEL) \
		$(if $(DATA),--data $(DATA)) --run.dir $(OUT) $(ARGS)

evaluate: $(READY) ## score a model on tasks: TASK=calame MODEL=models/demo DATA=folder, or each checkpoint of WATCH=runs/demo
	$(TORCHRUN) --nproc_per_node $(NPROC) -m gloria.evaluate --task $(TASK) \
		$(if $(WATCH),--watch $(WATCH),--model $(MODEL)) $(if $(DATA),--data $(DATA)) $(ARGS)

tensorboard: $(READY) ## curves of a run in the browser: RUN=runs/demo
	$(VENV)/bin/tensorboard --logdir $(RUN)/tensorboard

slurm-check: $(READY) ## is this machine fit for CONFIG? all nodes of a job: SRUN="srun -N 4 --ntasks-per-node 8 --gpus-per-node 8"
	$(SRUN) $(PYTHON) -m gloria.doctor --config $(CONFIG) $(ARGS)

slurm-test: $(READY) ## the job scripts on a Slurm of two nodes that it starts here (root; half an hour)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -m 'slurm or not slurm' tests/slurm $(ARGS)

docs: $(READY) ## the documents as a site: site/index.html
	$(PYTHON) -m pip install --quiet --editable '.[docs]'
	$(PYTHON) -m mkdocs build --strict

docs-check: $(READY) ## run every command of README and docs/ with small settings (half an hour)
	$(PYTHON) -m tests.docs $(ARGS)

bench: $(READY) ## the measurements of bench/ (half an hour on two cores)
	@for script in bench/*.py; do \
		case $$script in *checkpoint.py) run="$(TORCHRUN) --nproc_per_node 2";; *) run="$(PYTHON)";; esac; \
		echo "== $$script"; $$run $$script || exit 1; done

clean: ## remove what a build or a test leaves (corpora, runs and models stay)
	rm -rf .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
