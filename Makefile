# Everything a person or the CI runs. No step needs a compiler or CUDA.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install install-dev quickstart test test-slurm test-all faults campaign hosts soak architectures lint clean

# torch first: whatever depends on it then finds it installed. deepspeed is a source package
# whose build needs torch, so it is built against the one that is there.
$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt setuptools wheel packaging numpy psutil py-cpuinfo \
	    ninja hjson msgpack pydantic tqdm einops
	DS_BUILD_OPS=0 $(BIN)/pip install -q -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(BIN)/.installed-dev: $(BIN)/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

install: $(BIN)/.installed

install-dev: $(BIN)/.installed-dev

quickstart: $(BIN)/.installed
	deepspeed --num_gpus 2 launch/train.py --config configs/quickstart.yaml

# Two test files at a time. The long ones, whose ranks wait for one another now and then, come first.
SPREAD := -n 2 --dist loadfile --no-loadscope-reorder
TESTS  := tests/world tests/launch tests/unit tests/gpu tests/slurm

test: $(BIN)/.installed-dev lint
	python -m pytest -q $(SPREAD) $(TESTS)

# What takes too long for every change (CONTRIBUTING lists it): every engine with every method, save
# and resume between all engines, thousands of hostile files. An hour or two on two cores.
test-all: $(BIN)/.installed-dev lint
	RANKCAST_ALL=1 python -m pytest -q $(SPREAD) $(TESTS)

# Plants faults in copies of the project, one by one: which of them do the tests of `make test` catch?
faults: $(BIN)/.installed-dev
	python -m tests.campaigns.planted_faults

# Breaks runs on purpose, then lets one run for 20,000 steps (docs/reliability.md). Needs root for
# the file systems that it mounts.
campaign: $(BIN)/.installed-dev
	python -m tests.campaigns.faults build/faults
	python -m tests.campaigns.long_run build/long_run

# Runs over two and three hosts, which are network namespaces: cut, killed, different from one another.
# Needs root, and Debian's nftables. About half an hour on two cores; where it was stopped it goes on.
hosts: $(BIN)/.installed-dev
	python -m tests.campaigns.hosts build/hosts

# Sixty interrupted starts over engines, numbers of processes and launchers. About half an hour.
soak: $(BIN)/.installed-dev
	python -m tests.campaigns.soak build/soak

# Every architecture of the installed transformers, tiny, against transformers and PEFT; rewrites the
# table in docs/models.md. About half an hour on two cores, and resumed where it was stopped.
architectures: $(BIN)/.installed-dev
	python -m tests.campaigns.architectures build/architectures --table docs/models.md

# About ten minutes. SLURM comes from Debian's packages unless it is installed, runs from a temporary
# folder, and is stopped again.
test-slurm: $(BIN)/.installed-dev
	tests/slurm/install.sh
	RANKCAST_TEST_SLURM=1 python -m pytest -q tests/slurm

lint: $(BIN)/.installed-dev
	ruff check .
	ruff format --check .
	mypy

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
