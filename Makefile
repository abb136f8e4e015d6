# make demo      train and measure a robust digits classifier
# make test      run the test suite, in about a quarter of an hour on two cores
# make test-all  run the long tests too, such as a training by the headline command's own recipe
# make torture KILLS=100 INPUTS=10000   kill trainings, resume and compare; read damaged files
# make test-gpu  the tests that need a CUDA device, real kernels included
# make test-oldest TESTS=tests/engine/test_engine.py   with every dependency at its lower bound
# make lint      ruff and mypy
# make docs      the documentation site, into site/
# make bench     throughput of attack, training step and kernels
# make gpu       tests and measurements that need a GPU, in nine minutes; installs nothing
# make gpu-train DATA=DIR RUN=DIR   train IAT on an image tree for a given time, and measure it
# make gpu-results DATA=DIR RUN=DIR   speed run, Table 3, AutoAttack and diagnosis, nine minutes each
# PYTHON=python3.12 make demo   chooses the interpreter of .venv

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TOOLS := $(VENV)/.tools

.DEFAULT_GOAL := demo

# If PYTHON names another interpreter than that of .venv, .venv is created again.
ifneq ($(origin PYTHON),file)
IDENTITY := import sys; print(sys.version, sys.base_prefix)
ifneq ($(shell $(PYTHON) -c '$(IDENTITY)'),$(shell $(BIN)/python -c '$(IDENTITY)' 2> /dev/null))
CLEAR := yes
$(STAMP): FORCE
endif
endif

# A virtual environment with every dependency at its lower bound.
OLDEST := .venv-oldest
TESTS ?= tests

# Two processes with one thread each: threads that share cores slow each other down.
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

KILLS ?= 100
INPUTS ?= 10000

# A machine with PyTorch and no network can run the GPU scripts without a .venv.
ANY = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
DATA ?= my-images
RUN ?= runs/gpu-train

.PHONY: demo test test-all quick torture test-gpu test-oldest lint docs bench gpu gpu-train gpu-results clean FORCE

demo: $(STAMP)
	rm -rf runs/demo
	$(BIN)/fastiat train --arch preact18 --mix manifold --dataset digits --width 32 --epochs 8 \
		--schedule cosine --pad 1 --out runs/demo

test: $(TOOLS)
	$(call PYTEST,$(VENV)) -m "not long"

test-all: $(TOOLS)
	$(call PYTEST,$(VENV))

quick: $(TOOLS)
	$(call PYTEST,$(VENV)) -m "not slow and not long"

torture: $(TOOLS)
	$(BIN)/python tests/tools/torture.py --kills $(KILLS)
	$(BIN)/python tests/tools/fuzz.py --inputs $(INPUTS)

test-gpu: $(TOOLS)
	$(BIN)/python -c 'import torch; assert torch.cuda.is_available(), "there is no CUDA device"'
	$(BIN)/python -m pytest -m gpu

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python tests/tools/oldest.py --check
	$(call PYTEST,$(OLDEST)) -m "not slow and not long" $(TESTS)

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(TOOLS)
	$(BIN)/python -m mkdocs build --strict

bench: $(TOOLS)
	$(BIN)/python -m pytest bench --benchmark-only

gpu:
	$(ANY) bench/gpu/run.py $(ARGS)

gpu-train:
	$(ANY) bench/gpu/train.py --data-dir $(DATA) --out $(RUN) $(ARGS)

gpu-results:
	$(ANY) bench/gpu/sessions.py --data-dir $(DATA) --out $(RUN) $(ARGS)

clean:
	rm -rf $(VENV) $(OLDEST) build site *.egg-info

$(OLDEST)/.installed: pyproject.toml tests/tools/oldest.py
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python tests/tools/oldest.py > $(OLDEST)/pins.txt
	$(OLDEST)/bin/python -m pip install --quiet -e '.[dev]' --constraint $(OLDEST)/pins.txt
	touch $(OLDEST)/.installed

$(STAMP): pyproject.toml
	test -z "$(CLEAR)" -a -x $(BIN)/python || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e .
	touch $(STAMP)

$(TOOLS): $(STAMP)
	@pkg-config --exists opencv4 libturbojpeg || { echo "the tests need FFCV's system packages:" \
		"apt-get install g++ pkg-config libturbojpeg0-dev libopencv-dev" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(TOOLS)
