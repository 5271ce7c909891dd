PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-slow lint types docs bench clean

install: $(VENV)/installed

# torch comes first and by its version: a range would let the installer take a build with CUDA packages.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

demo: install
	rm -rf runs/demo
	$(BIN)/imaml train sinusoids --minutes 1 --out runs/demo
	$(BIN)/imaml evaluate runs/demo
	$(BIN)/imaml plot runs/demo

# One process for each core, of one thread each: most of the time goes to small tensors, which threads do not speed up.
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest --quiet --numprocesses auto

test-slow: install
	$(BIN)/pytest --quiet -m slow

lint: install
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

# All pages are executed, in one process for each core; then the examples of the API pages.
docs: $(VENV)/installed-docs
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build --jobs auto --nitpicky --fail-on-warning --quiet docs docs/_build/html
	$(BIN)/sphinx-build --quiet --builder doctest --define nb_execution_mode=off --define suppress_warnings=myst-nb.lexer docs docs/_build/doctest
	@echo "The pages are in docs/_build/html/index.html."

# Beside other libraries, which have an environment of their own; all ways on one thread.
bench: .venv-bench
	.venv-bench/bin/python -m benchmarks.peers
	.venv-bench/bin/python -m benchmarks.peers.capabilities
	.venv-bench/bin/python -m benchmarks.growth
	.venv-bench/bin/python -m benchmarks.overhead

.venv-bench:
	PYTHON=$(PYTHON) benchmarks/setup

clean:
	rm -rf $(VENV) .venv-bench runs docs/_build
