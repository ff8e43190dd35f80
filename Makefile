# Two commands for a newcomer: `make demo` and `make test`. Both make their own environment in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check format clean

demo: $(INSTALLED)  ## the whole pipeline on the embedded world: runs/reference/report.html
	$(BIN)/fac-ray run

test: check  ## everything that CI runs
	$(BIN)/python -m pytest

check: $(INSTALLED)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy fac_ray jobs serve benchmarks

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch first and with its dependencies (a CUDA build needs them), then the lock without: see docs/install.md
$(INSTALLED): requirements/cpu.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fac-ray needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/cpu.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

clean:  ## the environment and the runs
	rm -rf $(VENV) runs
