# Every target makes .venv and installs what it needs if that is missing (.ci/prepare.py), and nothing twice.
PYTHON ?= python3
PY := .venv/bin/python
# Passed on to the command behind a target: make test ARGS="-k matmul"
ARGS ?=
# Processes that run tests, each a file at a time; 0: this one. Most tests keep one core busy; a job of several ranks two.
WORKERS ?= 2
TESTS := -m pytest -n $(WORKERS) --dist loadfile

define ready
@command -v $(PYTHON) >/dev/null 2>&1 || { \
  echo "treadle: no $(PYTHON) on the path; install Python 3.10 or newer." >&2; exit 1; }
@$(PYTHON) .ci/prepare.py $(1)
endef

.PHONY: help demo test quick test-hosts test-all lint bench clean
.DEFAULT_GOAL := help

help:  ## This list.
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /: /'

demo:  ## Fine-tune an ONNX encoder on Shakespeare and export it again (ARGS=mnist: a CNN from nothing).
	$(call ready,demo)
	@$(PY) -m treadle demo $(ARGS)

test:  ## The whole suite, without the live comparison with torch.
	$(call ready,test mpi demo)
	@$(PY) $(TESTS) -m "not oracle and not hosts" $(ARGS)

quick:  ## The tests that take a few seconds each at most.
	$(call ready,test mpi)
	@$(PY) $(TESTS) -m "not oracle and not slow" $(ARGS)

test-hosts:  ## Every job of the tests on two hosts: network namespaces of this machine (Linux, as root).
	$(call ready,test mpi)
	@$(PY) -m pytest -m hosts tests/distributed $(ARGS)

test-all:  ## The whole suite, torch as a live second oracle included (installs torch).
	$(call ready,test mpi demo oracle)
	@$(PY) $(TESTS) $(ARGS)

lint:  ## ruff, and mypy over the package.
	$(call ready,test mpi)
	@$(PY) -m ruff check .
	@cd .venv/names && ../bin/python -m mypy --config-file ../../pyproject.toml \
	  -m treadle -p treadle.ir -p treadle.autodiff -p treadle.schedules -p treadle.distributed -p treadle.frontend

bench:  ## Speed and memory beside torch eager, torch.compile, JAX and ONNX Runtime (installs them).
	$(call ready,bench test)
	@$(PY) benchmarks/run.py $(ARGS)

clean:  ## Remove the environment and what the tools left.
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist out treadle.egg-info
