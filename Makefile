# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv if need be.
# `make test-plain` runs the tests that calculate once more, as on a processor without vector units.
PYTHON ?= python3
BIN := .venv/bin
STAGES ?= 8
# The tests run in several processes: one thread for each is enough.
THREADS ?= 1
# A process that is done takes over tests of another: without `worksteal` one has all dear ones.
PYTEST := OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n logical --maxprocesses 4 \
	--dist worksteal

.PHONY: demo dashboard test test-plain lint clean

# 4 examples a label: with many more of them a prompt has little to win here.
demo: .venv/.demo
	$(BIN)/optuna-llm-catalyst tune demo --shots 4 --storage sqlite:///demo.db --study-name demo \
		--stages $(STAGES) --steps 40 --text-steps 60 --artifacts demo.artifacts

dashboard: .venv/.demo
	$(BIN)/optuna-dashboard sqlite:///demo.db --artifact-dir demo.artifacts

test: .venv/.dev
	$(PYTEST)

# The tests that calculate: what holds on one processor only, fails here.
NUMERIC := $(foreach part,black_box causal_lm clip families head layers linear_fit logistic \
	masked_lm models objective pooling projection stages,tests/prompt_tuning/test_$(part).py)

test-plain: .venv/.dev
	ATEN_CPU_CAPABILITY=default MKL_NUM_THREADS=1 $(PYTEST) $(NUMERIC)

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
