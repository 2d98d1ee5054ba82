# Everything happens in .venv, which `make clean` removes. Needs Python >= 3.10 and a C compiler.
#
#   make demo        compile, verify and time the layers of a real ONNX file
#   make test        the test suite
#   make test-peers  the same operator in PyTorch, every peer, links for other machines; TORCH=torch==2.13.0 picks a version
#   make test-gpu    every case as GPU code, simulated on the CPU
#   make test-onnxruntime  replaced nodes at length, inside the oldest and the newest ONNX Runtime
#   make lint types  what must hold of the code
#   make bench       every real layer against all peers: bench.json, bench.svg, and a table in Markdown
#
# PYTHON=python3.12 chooses the interpreter, ARGS="-k spec -x" goes on to pytest.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
DEMO ?= tests/models/dynunet.onnx
ARGS ?=

BIN := $(VENV)/bin
RUN := $(BIN)/python -m
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-gpu test-peers test-onnxruntime lint types bench clean

demo: $(VENV)/.installed
	$(BIN)/opcompile compile $(DEMO) -o demo-artifacts
	$(BIN)/opcompile verify demo-artifacts
	$(BIN)/opcompile bench $(DEMO) --seconds 0.5

test: $(VENV)/.installed-test
	$(RUN) pytest -n auto --dist loadfile -m "not peers and not heavy and not gpu_table" $(ARGS)

test-gpu: $(VENV)/.installed-test
	$(RUN) pytest -n auto -m gpu_table $(ARGS)

test-peers: $(VENV)/.installed-test
	$(INSTALL) "$(TORCH)" --editable ".[cross,peers,plot]"
	$(RUN) pytest -m peers $(ARGS)

# The oldest lies in a folder of its own, before the newest on Python's path.
test-onnxruntime: $(VENV)/.installed-test
	$(INSTALL) --no-deps --upgrade --target $(VENV)/oldest onnxruntime==1.20.1
	PYTHONPATH=$(VENV)/oldest $(RUN) pytest -n auto --dist loadfile tests/test_replace.py tests/test_replace_hosts.py tests/test_fuzz_replace.py $(ARGS)
	OPCOMPILE_TEST_RUNS=1000 OPCOMPILE_TEST_EXAMPLES=200 $(RUN) pytest -n auto --dist loadfile tests/test_replace_hosts.py tests/test_fuzz_replace.py $(ARGS)
	$(RUN) pytest -m heavy $(ARGS)

lint: $(VENV)/.installed-dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(VENV)/.installed-dev
	$(RUN) mypy

bench: $(VENV)/.installed
	$(INSTALL) "$(TORCH)" --editable ".[peers,plot]"
	$(BIN)/opcompile bench --tag real --against all --save bench.json --plot bench.svg --markdown

clean:
	rm -rf $(VENV) demo-artifacts bench.json bench.svg .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The package is installed in place, so that these need repeating only when pyproject.toml changes.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(INSTALL) --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(INSTALL) --editable ".[test]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(INSTALL) --editable ".[dev]"
	touch $@ $(VENV)/.installed-test $(VENV)/.installed
