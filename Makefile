# Everything happens in .venv, which `make clean` removes. Needs Python >= 3.10 and a C compiler.
#
#   make demo        compile, verify and time the layers of a real ONNX file
#   make test        the test suite
#   make test-peers  the same operator in PyTorch, MLX, Keras, JAX, OpenVINO, and on an emulated arm64;
#                    TORCH=torch==2.13.0 picks a version
#   make test-gpu    every case as GPU code, simulated on the CPU
#   make test-on-gpu  every case on a GPU of NVIDIA, and its compute-sanitizer; needs one, nvcc and PyTorch for CUDA
#   make test-long   what takes long: real models, many threads, fuzzing, dying servers, every activation
#   make test-onnxruntime  replaced nodes inside the oldest ONNX Runtime that is supported
#   make test-tensorflow test-lucid   TensorFlow's and Lucid's grids, each in an environment of its own
#   make conformance put every grid to the real systems, and write docs/conformance.md
#   make lint types  what must hold of the code
#   make bench       every real layer against all peers: bench.json, bench.svg, and a table in Markdown
#
# PYTHON=python3.12 chooses the interpreter, ARGS="-k spec -x" goes on to pytest.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
DEMO ?= tests/models/dynunet.onnx
ARGS ?=
# Lucid 2 runs on this Python alone
LUCID_PYTHON ?= python3.12
LUCID ?= lucid-dl==2.8.5
# on macOS: tensorflow
TENSORFLOW ?= tensorflow-cpu

BIN := $(VENV)/bin
RUN := $(BIN)/python -m
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# where it is set, each process that a test starts would compile our sources anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-gpu test-on-gpu test-peers test-long test-onnxruntime test-tensorflow test-lucid conformance lint types bench clean

demo: $(VENV)/.installed
	$(BIN)/opcompile compile $(DEMO) -o demo-artifacts
	$(BIN)/opcompile verify demo-artifacts
	$(BIN)/opcompile bench $(DEMO) --seconds 0.5

test: $(VENV)/.installed-test
	$(RUN) pytest -n auto --dist loadfile -m "not peers and not heavy and not gpu_table and not gpu" $(ARGS)

test-gpu: $(VENV)/.installed-test
	$(RUN) pytest -n auto -m gpu_table $(ARGS)

test-on-gpu: $(VENV)/.installed-test
	$(INSTALL) "$(TORCH)"
	$(RUN) pytest -n auto -m gpu tests/test_on_gpu.py $(ARGS)

test-peers: $(VENV)/.installed-test
	$(INSTALL) "$(TORCH)" --editable ".[cross,emulate,peers,plot,words]"
	$(RUN) pytest -n auto -m peers $(ARGS)

# The oldest lies in a folder of its own, before the newest on Python's path.
test-onnxruntime: $(VENV)/.installed-test
	$(INSTALL) --no-deps --upgrade --target $(VENV)/oldest onnxruntime==1.20.1
	PYTHONPATH=$(VENV)/oldest $(RUN) pytest -n auto --dist loadfile tests/test_replace.py tests/test_replace_models.py tests/test_replace_hosts.py tests/test_fuzz_replace.py $(ARGS)

test-long: $(VENV)/.installed-test
	OPCOMPILE_TEST_RUNS=1000 OPCOMPILE_TEST_EXAMPLES=200 $(RUN) pytest -n auto --dist loadfile -m heavy $(ARGS)

test-tensorflow: $(VENV)-tensorflow/.installed
	TF_ENABLE_ONEDNN_OPTS=0 TF_CPP_MIN_LOG_LEVEL=3 PYTHONPATH=.:tests $(VENV)-tensorflow/bin/python -m conformance with_tensorflow

test-lucid: $(VENV)-lucid/.installed
	PYTHONPATH=.:tests $(VENV)-lucid/bin/python -m conformance with_lucid

conformance: $(VENV)/.installed-test
	$(INSTALL) "$(TORCH)" --editable ".[peers,words]"
	PYTHONPATH=.:tests $(RUN) conformance write

lint: $(VENV)/.installed-dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(VENV)/.installed-dev
	$(RUN) mypy
	$(RUN) pytest tests/test_docs.py -k test_the_python_examples_have_the_right_types

bench: $(VENV)/.installed
	$(INSTALL) "$(TORCH)" --editable ".[peers,plot]"
	$(BIN)/opcompile bench --tag real --against all --save bench.json --plot bench.svg --markdown

clean:
	rm -rf $(VENV) $(VENV)-tensorflow $(VENV)-lucid demo-artifacts bench.json bench.svg .pytest_cache .mypy_cache .ruff_cache .hypothesis

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

# Their requirements would disturb ours: TensorFlow bounds protobuf, Lucid needs its own Python.
$(VENV)-tensorflow/.installed:
	$(PYTHON) -m venv $(VENV)-tensorflow
	$(VENV)-tensorflow/bin/python -m pip install --quiet --disable-pip-version-check $(TENSORFLOW)
	touch $@

$(VENV)-lucid/.installed:
	$(LUCID_PYTHON) -m venv $(VENV)-lucid
	$(VENV)-lucid/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "$(LUCID)"
	$(VENV)-lucid/bin/python -m pip install --quiet --disable-pip-version-check numpy scikit-learn pandas openml "mlx[cpu]"
	touch $@
