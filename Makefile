# Everything here makes the virtual environment it needs. PYTHON picks the interpreter, VENV the folder, TORCH the versions.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch torchvision
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-interpreted test-all check format docs clean help

help:
	@echo "make demo              distil a student on handwritten digits (about two minutes after installation)"
	@echo "make test              the fast tests"
	@echo "make test-interpreted  the kernels' tests again, in Triton's interpreter"
	@echo "make test-all          both, then the long fuzz tests and the comparisons of speed"
	@echo "make check             ruff and mypy"
	@echo "make format            ruff's formatter and fixes"
	@echo "make docs              this documentation as a site, in build/docs; offline, and a warning is an error"
	@echo "make clean             remove environments, caches and runs"

$(READY): setup.py pyproject.toml $(wildcard kernels/*.c)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH) -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/kdfast distill

test: $(READY)
	$(PYTEST) -n 2 -m "not slow and not speed"
	@echo "make test-all adds: long fuzz tests, the kernels in Triton's interpreter, comparisons of speed"

test-interpreted: $(READY)
	TRITON_INTERPRET=1 $(PYTEST) -n 2 -m "kernels and not slow and not speed"

test-all: $(READY)
	$(PYTEST) -n 2 -m "not speed"
	TRITON_INTERPRET=1 $(PYTEST) -n 2 -m "kernels and not speed"
	$(PYTEST) -m speed

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(READY)
	$(BIN)/python -m sphinx -q -W --keep-going docs build/docs
	@echo "open build/docs/index.html"

clean:
	rm -rf .venv .venv-* build *.egg-info kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
