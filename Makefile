# Every target makes what it needs in .venv (test-oldest: .venv-oldest, docs: .venv-docs) first. That is repeated only when the list of
# dependencies changes.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
OLDEST := .venv-oldest/bin
OLDEST_READY := .venv-oldest/.ready
DOCS_READY := .venv-docs/.ready
# Tests run in one process per core, at most eight; a file's tests stay in one, because they share fixtures. Each computes with one thread, because threads of several processes block one another.
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count() or 1))')

TESTS ?= tests

.PHONY: demo test test-slow test-oldest verify lint docs clean

demo: $(READY)
	$(BIN)/continual-concepts demo --output demo $(if $(BASE),--base embedded-$(BASE:embedded-%=%))

# -I keeps this folder off sys.path, where nodes/ would hide ComfyUI's nodes.py.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -I -m pytest -q -n $(JOBS) --dist loadfile -m "not slow and not host and not live" \
	  --ignore=tests/host --ignore=tests/live $(TESTS)

# What make test leaves out, because it takes more than a few seconds or is one of many cases of a kind.
test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -I -m pytest -q -n $(JOBS) --dist loadfile -m "slow and not host and not live" \
	  --ignore=tests/host --ignore=tests/live $(TESTS)

# make test with the oldest versions that pyproject.toml declares. That pytest cannot import the helpers of the host tests.
test-oldest: $(OLDEST_READY)
	OMP_NUM_THREADS=1 $(OLDEST)/python -I -m pytest -q -n $(JOBS) --dist loadfile -m "not slow" --ignore=tests/host --ignore=tests/live $(TESTS)

# The long form of the randomised tests: 120,000 damaged files and texts, 500 bank histories, 300 killed writers. Where there is a ComfyUI
# (see CONTRIBUTING), also every fault at every stage and 500 queue runs in one server. Each of the two parts takes about half an hour.
COMFYUI_PYTHON ?= $(firstword $(wildcard $(COMFYUI_PATH)/.venv/bin/python $(HOME)/comfy/ComfyUI/.venv/bin/python) $(BIN)/python)
verify: $(READY)
	CONTINUAL_CONCEPTS_VERIFY=1 $(BIN)/python -I -m pytest -q tests/bank/test_fuzz.py tests/bank/test_bank_model.py tests/bank/test_store.py
	CONTINUAL_CONCEPTS_VERIFY=1 $(COMFYUI_PYTHON) -I -m pytest -q tests/host/test_faults.py tests/live/test_soak.py

# mypy needs a folder with the package's name; the folder of this checkout may have any name.
lint: $(READY)
	$(BIN)/ruff check .
	@mkdir -p .venv/types && ln -sfn ../.. .venv/types/continual_concepts
	MYPYPATH=.venv/types $(BIN)/mypy -p continual_concepts.core -p continual_concepts.nodes

# The site of docs/, in site/. A link that leads nowhere is an error.
docs: $(DOCS_READY)
	.venv-docs/bin/mkdocs build --strict --quiet
	@echo "open site/index.html"

clean:
	rm -rf .venv .venv-oldest .venv-docs site demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

define CHECK_PYTHON
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
  echo "Continual Concepts needs Python 3.10 or newer; '$(PYTHON)' is not one. Name another: make PYTHON=python3.12" >&2; exit 1; }
endef

$(READY): pyproject.toml setup.py
	$(CHECK_PYTHON)
	@.venv/bin/python -c 'import torch' 2>/dev/null || echo "Setting up .venv: downloads of some gigabytes, without further lines for some minutes. For a smaller PyTorch on Linux without a graphics card, stop and see docs/command-line.md."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[demo,lint,test]"
	@touch $@

$(DOCS_READY): Makefile
	$(CHECK_PYTHON)
	@$(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check "mkdocs-material>=9.6,<10"
	@touch $@

# uv installs, per package, the oldest allowed version that has a wheel for this Python.
$(OLDEST_READY): pyproject.toml setup.py
	$(CHECK_PYTHON)
	@echo "Setting up .venv-oldest. PyTorch is a large download: the first time takes some minutes."
	@$(PYTHON) -m venv --clear .venv-oldest
	@$(OLDEST)/python -m pip install --quiet --disable-pip-version-check uv
	@$(OLDEST)/uv pip install --quiet --python $(OLDEST)/python --resolution lowest-direct --no-build \
	  --requirements pyproject.toml --extra demo --extra test
	@$(OLDEST)/uv pip install --quiet --python $(OLDEST)/python --no-deps --editable .
	@touch $@
