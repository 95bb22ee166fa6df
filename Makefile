# On a fresh machine `make demo` and `make test` do everything: a virtual environment in .venv (on top of the active one
# where that has a torch that fits), the packages, the build. Nothing outside this folder is changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# A file of the build is newer than these or it is made again; the folders are among them, so a removed file counts.
NATIVE_SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find cmake csrc)
CPP_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
LOWER_LEVELS = $(shell $(BIN)/python -c "from pyfused import _C; print(*_C.available_cpu_capabilities()[:-1])")

# Programs such as ruff lie in .venv, or beside the active Python that .venv lies on top of.
export PATH := $(CURDIR)/$(BIN):$(PATH):$(dir $(shell command -v $(PYTHON) 2>/dev/null))
# The tests and the demo use local files only.
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help build demo test test-all cpu-emulation cuda-check bench lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      fine-tune a real model with HF PEFT, eager PyTorch and pyfused, and compare"
	@echo "make test      lint, and the tests on every CPU level that the machine has"
	@echo "make test-all  the same with the slow tests"
	@echo "make cpu-emulation  the tests of ops and modules on AVX512, AVX512_BF16 and AMX, on a machine with AVX2"
	@echo "make cuda-check  what can be proved of the CUDA kernels without a GPU (needs nvcc and a package index)"
	@echo "make build     the native libraries, into pyfused/"
	@echo "make bench     the quick benchmark (under two minutes)"
	@echo "make lint      ruff and clang-format, check only;  make format  applies them"
	@echo "make clean     removes what was built, not .venv"

$(VENV)/.packages: pyproject.toml tools/setup_env.py
	$(PYTHON) tools/setup_env.py $(VENV)
	@touch $@

# AdapterHub as a test oracle needs another transformers.
.venv-adapterhub/.packages: tools/adapterhub_env.py tools/layered_env.py | $(VENV)/.packages
	python tools/adapterhub_env.py .venv-adapterhub
	@touch $@

# vLLM, for the slow tests; where it cannot be installed they are skipped.
.venv-vllm/.packages: tools/vllm_env.py | $(VENV)/.packages
	python tools/vllm_env.py .venv-vllm && touch $@ || true

# SGLang's LoRA code, likewise.
.venv-sglang/.packages: tools/sglang_env.py tools/layered_env.py | $(VENV)/.packages
	python tools/sglang_env.py .venv-sglang && touch $@ || true

pyfused/_ops.so: $(VENV)/.packages $(NATIVE_SOURCES)
	python setup.py -q build_ext --inplace
	@touch $@

$(VENV)/.installed: $(VENV)/.packages setup.py | pyfused/_ops.so
	python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

build: pyfused/_ops.so $(VENV)/.installed

demo: build
	python -m pyfused.demo

bench: build
	python benchmarks/bench_lora.py --quick

# The lower levels first and the whole suite last, so that the output closes with the summary of the whole suite.
test: PYTEST_ARGS := -m "not slow"
test-all: .venv-vllm/.packages .venv-sglang/.packages
test test-all: lint build .venv-adapterhub/.packages
	@for level in $(LOWER_LEVELS); do \
	  echo "== ops and modules on CPU level $$level"; \
	  PYFUSED_CPU_CAPABILITY=$$level python -m pytest -q $(PYTEST_ARGS) tests/ops tests/nn || exit 1; \
	done
	@echo "== bf16 kernels in AMX tiles, emulated where the machine has none"
	python tools/cpu_emulation.py --missing --level AMX $(PYTEST_ARGS) -k "(bf16 or tiles or panels) and not compile" tests/ops
	@echo "== everything on the machine's best level"
	python -m pytest $(PYTEST_ARGS)

cpu-emulation: build
	python tools/cpu_emulation.py -m "not slow"

cuda-check: build
	python tools/cuda_check.py

lint: $(VENV)/.packages
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CPP_FILES)

format: $(VENV)/.packages
	ruff check --fix .
	ruff format .
	clang-format -i $(CPP_FILES)

clean:
	rm -rf build dist *.egg-info pyfused/*.so .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +
