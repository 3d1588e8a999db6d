# Everything a person or the CI runs. No step needs a compiler or CUDA.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install install-dev quickstart test test-slurm test-all nightly docs path image faults campaign hosts \
    soak architectures lint clean

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
	rankcast train --processes 2 --config configs/quickstart.yaml

# Two test files at a time. The long ones, whose ranks wait for one another now and then, come first.
SPREAD := -n 2 --dist loadfile --no-loadscope-reorder
TESTS  := tests/world tests/launch tests/unit tests/gpu tests/slurm

test: $(BIN)/.installed-dev lint
	python -m pytest -q $(SPREAD) $(TESTS)

# What takes too long for every change (CONTRIBUTING lists it): every engine with every method, save
# and resume between all engines, thousands of hostile files. An hour or two on two cores.
test-all: $(BIN)/.installed-dev lint
	RANKCAST_ALL=1 python -m pytest -q $(SPREAD) $(TESTS)

# The tests most exposed to versions, with the newest torch and transformers of the index (or
# `make nightly NEWEST="torch==2.11.0 transformers==5.17.0"`), in an environment of its own that takes
# everything else from this one. With PIP_PRE=1 and a nightly index, tomorrow's.
NEWEST  ?= torch transformers
EXPOSED := tests/unit/trainer/loading tests/unit/trainer/generation tests/unit/trainer/model \
    tests/unit/trainer/export tests/unit/adapters/layers tests/unit/adapters/test_optimizer.py \
    tests/world/test_engines.py tests/world/test_gpt_oss.py tests/world/test_verification.py
nightly: $(BIN)/.installed-dev
	$(PYTHON) -m venv --clear build/nightly
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
	    "$$(build/nightly/bin/python -c 'import site; print(site.getsitepackages()[0])')/rest.pth"
	build/nightly/bin/pip install -q --upgrade --ignore-installed $(NEWEST)
	build/nightly/bin/python -m pytest -q $(EXPOSED)

# The site, in build/site.
docs: $(BIN)/.installed-dev
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

# What a user does, from the built wheel on, in an environment of its own; rewrites the transcript in
# docs/getting-started.md. RANKCAST_SMOLLM2: a folder with SmolLM2-135M-Instruct.
path: $(BIN)/.installed-dev
	python -m tests.campaigns.users_path build/path --write docs/getting-started.md

# The Dockerfile's steps without Docker, in a clean Debian folder by debootstrap, with torch for CPUs.
# Needs root; 12 minutes on two busy cores, 2.5 GB. Without a way to torch's index, from wheels in /wheels:
# make image IMAGE="--bind /wheels --env PIP_FIND_LINKS=/wheels"
IMAGE ?= --arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
image: $(BIN)/.installed-dev
	python -m tests.campaigns.image build/image $(IMAGE)

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
