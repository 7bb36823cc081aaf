# Everything here makes the virtual environment it needs. PYTHON picks the interpreter, VENV the folder, TORCH the versions.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch torchvision
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# tests of operators with kernels, which run once more where Triton interprets these on the CPU
INTERPRETED := $(addprefix tests/test_,distill_kl.py distill_kl_kernel.py linear_kd.py supcon.py supcon_kernel.py crd.py nce_kernel.py \
	lion.py lion_kernel.py feature_losses.py attention_map_kernel.py)

.PHONY: demo test lint format clean help

help:
	@echo "make demo    install, and distil a student on handwritten digits (about two minutes after installation)"
	@echo "make test    install, and run the tests, those of kernels in Triton's interpreter too"
	@echo "make lint    ruff, its formatter and mypy"
	@echo "make clean   remove environments, caches and runs"

$(READY): setup.py pyproject.toml $(wildcard kernels/*.c)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH) -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/kdfast distill

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not speed"
	$(BIN)/python -m pytest -m speed
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m "not speed" $(INTERPRETED)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv .venv-* build *.egg-info kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
