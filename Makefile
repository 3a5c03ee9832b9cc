# Two commands do everything; they need only Python (3.11 or newer) and make:
#
#   make train    make an environment, install, train the handwritten digits on 2 ranks
#   make test     the same environment, then every check and test
#
# `make help` lists the rest.
# VENV=DIR keeps the environment elsewhere, so that several clones can share one; each still runs its own code.

PYTHON ?= python3
VENV ?= .venv
RANKS ?= 2
ARGS ?=

BIN = $(VENV)/bin
STAMP = $(VENV)/.distckpt-installed

# This clone's code comes first, whatever the environment has installed.
export PYTHONPATH := $(CURDIR)
# One thread a rank is torchrun's own default; said here, it neither warns nor changes with the machine.
export OMP_NUM_THREADS ?= 1

# A command for people stands in the clone's own environment; a shared one gets the dependencies alone.
ITSELF = $(if $(filter .venv $(CURDIR)/.venv,$(VENV)),--editable .)

.DEFAULT_GOAL := help
.PHONY: help train test check format docs bench bench-gpu environment clean
.NOTPARALLEL:

help:
	@echo 'make train           train the digits on 2 ranks, or go on with it'
	@echo 'make train ARGS=...  the same with other settings: ARGS="--config configs/NAME.yaml --seed 1"'
	@echo 'make train RANKS=4   the same on another number of ranks'
	@echo 'make test            every check and every test'
	@echo 'make test ARGS=...   the same with arguments for pytest: ARGS="-k retention -x"'
	@echo 'make check           the checks alone: style, types, floors'
	@echo 'make format          put the code into the house style'
	@echo 'make docs            API pages from the docstrings, in build/api/'
	@echo 'make bench           every benchmark, beside the peers that install; ARGS="--size full" for larger states'
	@echo 'make bench-gpu       what is worth measuring on one NVIDIA GPU, in under ten minutes'
	@echo 'make environment     only make the environment and install'
	@echo 'make clean           remove the environment in .venv and every cache; runs/ stays'
	@echo
	@echo 'VENV=DIR             keep the environment in DIR (now: $(VENV))'
	@echo 'PYTHON=COMMAND       make the environment with this Python (now: $(PYTHON))'

train: environment
	$(BIN)/python -m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc_per_node=$(RANKS) \
	    train.py $(ARGS)

test: check
	$(BIN)/python -m pytest $(ARGS)

check: environment
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: environment
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: environment
	$(BIN)/python docs/api.py build/api

# A peer that does not install is reported by the benchmarks as missing; its error stands here.
bench: environment
	-$(BIN)/python -m pip install --quiet --group bench
	$(BIN)/python -m benchmarks $(ARGS)

# Not in the environment above: a machine with a GPU has a torch of its own. PYTHON chooses it, WHEELS what it lacks.
bench-gpu:
	PYTHON=$(PYTHON) benchmarks/gpu.sh $(ARGS)

# The stamp holds the checksum of the pyproject.toml that was installed: another clone with the same file
# installs nothing, and a half-made environment has no stamp. The lock keeps two clones from installing at once.
environment:
	@mkdir -p $(VENV)
	@exec 9> $(VENV)/.distckpt-lock; if command -v flock > /dev/null; then flock 9; fi; \
	found=$$(cksum < pyproject.toml); \
	if [ "$$(cat $(STAMP) 2> /dev/null)" = "$$found" ]; then exit 0; fi; \
	rm -f $(STAMP); \
	if ! $(BIN)/python -m pip --version > /dev/null 2>&1; then \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	        { echo 'distckpt needs Python 3.11 or newer. Fix: make PYTHON=python3.12 ...' >&2; exit 1; }; \
	    $(PYTHON) -m venv $(VENV) || exit 1; \
	fi; \
	set -ex; \
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'; \
	$(BIN)/python -m pip install --group dev $(ITSELF); \
	echo "$$found" > $(STAMP)

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
