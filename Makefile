# Every target sets up what it needs in .venv and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest

.PHONY: help install demo test test-waiting test-computing test-fast test-oldest lint api bench bench-faults bench-image gpu clean

help:
	@echo "make demo       the first run: small built-in data set, training, result"
	@echo "make test       all tests          make test-fast   those of a few seconds"
	@echo "make test-oldest    those of a few seconds, with the oldest packages that setup.cfg allows (5 GB of disk)"
	@echo "make lint       ruff and mypy      make bench       what a run learns: README's table anew (CIFAR=FOLDER adds CIFAR-10's)"
	@echo "make api        the API reference from the docstrings, in build/api"
	@echo "make bench-faults   kills, preemptions, lost nodes and full disks, many times each (more than an hour, root, SLURM)"
	@echo "make gpu        all that is proved and measured on a GPU, in 8 minutes (benchmarks/gpu.py)"
	@echo "make bench-image    builds docker/Dockerfile on a fresh Debian, and trains in it (10 minutes, root, 25 GB of disk)"

install: $(VENV)/.installed

# Run-time packages alone: what the demo needs.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), "Python 3.11 to 3.13 is needed: make PYTHON=python3.12"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,dev]'
	touch $@

demo: install
	$(BIN)/simclr-dist demo

# In two halves at once: one mostly waits, for clusters, networks and other ranks; one computes. What the first says comes at its end.
WAITING := tests/slurm tests/launch/submit tests/network tests/image tests/faults tests/distributed

test: $(VENV)/.installed-dev
	@$(MAKE) --no-print-directory --jobs 2 --keep-going test-waiting test-computing

test-waiting: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest $(WAITING) > $(VENV)/test-waiting.log 2>&1; code=$$?; cat $(VENV)/test-waiting.log; exit $$code

test-computing: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(addprefix --ignore=,$(WAITING))

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m 'not slow'

# setup.cfg's lower bounds, torchvision and setuptools as this torch wants them, and constraints.txt for all others.
$(OLDEST)/.installed: setup.cfg constraints.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	awk -F'>=|==|,' '/^ +[a-z-]+>=/ {gsub(" ", "", $$1); bound[$$1]; print $$1 "==" $$2} \
		/^[A-Za-z].*==/ && !($$1 in bound) && $$1 !~ /^(torchvision|setuptools)$$/' setup.cfg constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(OLDEST)/constraints.txt --editable '.[test,dev]'
	touch $@

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -m 'not slow'

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

api: $(VENV)/.installed-dev
	$(BIN)/python docs/api.py build/api
	@echo "open build/api/index.html"

# Five seeds of the demo (15 minutes), and with CIFAR=FOLDER of train.parquet and test.parquet three of its recipe (40). Writes README's table.
bench: $(VENV)/.installed-dev
	test -z "$(CIFAR)" || ls $(CIFAR)/train.parquet $(CIFAR)/test.parquet
	rm -rf benchmarks/results/demo.json runs/demo-seed-* runs/demo-control-*
	$(BIN)/python benchmarks/demo_seeds.py
	test -z "$(CIFAR)" || rm -rf benchmarks/results/recipe.json runs/recipe
	test -z "$(CIFAR)" || $(BIN)/python benchmarks/recipe.py --train $(CIFAR)/train.parquet --test $(CIFAR)/test.parquet --folder runs/recipe
	$(BIN)/python benchmarks/tables.py

# Prints the tables that benchmarks/RESULTS.md holds.
bench-faults: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/faults.py
	$(BIN)/python benchmarks/faults_slurm.py

# Prints a table: seconds, sizes, and what ran inside.
bench-image: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/image.py

# Writes its results into benchmarks/results. A machine without network takes the script itself, with its own torch.
gpu: $(VENV)/.installed
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info
