# make demo: shrink a real model on this machine.   make test: lint, format, types, tests.
# Both make their own .venv with tested versions; ARGS= adds settings, PYTHON= chooses the interpreter, WORKERS= how many
# processes test at a time.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
RUN := $(BIN)/python -m compress
# Huge pages for large tensors, 1.5x on a step; read by the C library when a process starts.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test test-slow test-slurm check clean

demo: .venv/demo.stamp
	$(RUN) recipe=smollm2_135m_to_100m $(ARGS)

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Jobs on a real Slurm of three nodes that the tests bring up and take down; skipped, with the reason, where they can't.
test-slurm: .venv/dev.stamp
	$(BIN)/python -m pytest -m slurm tests/slurm $(ARGS)

# The minutes-long tests, among them those on the real model and on lm-eval.
test-slow: .venv/slow.stamp
	$(BIN)/python -m pytest -m slow -n 2 $(ARGS)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/demo.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e '.[embedded]'
	@touch $@

.venv/dev.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@ .venv/demo.stamp

.venv/slow.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,lm-eval]'
	@touch $@ .venv/dev.stamp .venv/demo.stamp

clean:
	rm -rf .venv dist build
