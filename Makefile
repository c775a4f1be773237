# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv if need be.
PYTHON ?= python3
BIN := .venv/bin
STAGES ?= 10

.PHONY: demo test lint clean

demo: .venv/.demo
	$(BIN)/optuna-llm-catalyst tune demo --storage sqlite:///demo.db --study-name demo \
		--stages $(STAGES) --steps 60 --artifacts demo.artifacts

test: .venv/.dev
	$(BIN)/python -m pytest

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Everything for development is more than everything for the demo.
.venv/.demo: pyproject.toml constraints.txt | .venv/.python
	test -f .venv/.dev || $(BIN)/python -m pip install -q -c constraints.txt -e '.[demo]'
	touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/.python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.venv/.python:
	$(PYTHON) -m venv .venv
	touch $@

clean:
	rm -rf .venv demo.db demo.artifacts
