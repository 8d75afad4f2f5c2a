# make demo | make test | make check | make setup | make lock | make clean
# Everything is installed into $(VENV) on the first call; later calls start at once, until the pinned set or pyproject.toml changes.

SHELL    := /bin/bash
VENV     ?= .venv
# The first Python on the path that the pinned set was made for; `make PYTHON=/path/to/python3.12 …` takes another.
PYTHON   ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
BIN      := $(VENV)/bin
LOCK     := requirements/cpu.txt
STAMP    := $(VENV)/.ready-$(shell (pwd; cat $(LOCK) pyproject.toml mmopd/repair.py) | sha256sum | cut -c1-16)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM        := false

.PHONY: setup demo test check format lock clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/mmopd demo $(ARGS)

setup: $(STAMP)

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m mypy

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

lock: $(STAMP)
	$(BIN)/python requirements/lock.py

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# The packages come first and complete (--no-deps: the file names them all); then what is broken on this machine is mended.
$(STAMP):
	@test -n "$(PYTHON)" || { echo "mmopd needs Python 3.11, 3.12 or 3.13 with venv (Debian: apt install python3.11-venv); \
	name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version): about 250 packages, 4 GB, some minutes"
	@$(PYTHON) -m venv $(VENV)
	@set -o pipefail; $(BIN)/python -m pip install --no-deps --no-compile --progress-bar off -r $(LOCK) 2>&1 | tee $(VENV)/install.log \
	| awk -v n="$$(grep -c == $(LOCK))" '/^(Collecting|Processing)/ && ++i % 25 == 0 {print "  fetched", i, "of", n} /^Installing/ {print "  unpacking"} {fflush()}' || { \
	grep -v Ignored $(VENV)/install.log | tail -n 8; echo "The set-up failed; all of pip's words are in $(VENV)/install.log. If it found no torch with +cpu in \
	its version, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels and run make again."; exit 1; } >&2
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@$(BIN)/python -m mmopd.repair
	@rm -f $(VENV)/.ready-* && touch $@
