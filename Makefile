# make demo, make test: everything from a bare clone, given python3 (3.10+), make and a C++ compiler.
#
# For work on the libraries, in an environment of your own that has torch, cmake, ninja and setuptools:
#   make build VENV_PYTHON=path/to/python     compile what changed, into effkern/lib
#   make test  VENV_PYTHON=path/to/python     the same, then all checks and tests; no .venv is made
#
# Variables: PYTHON (which python3 makes .venv), TORCH (which torch goes in: TORCH=torch==2.13.0),
# EFFKERN_BUILD (cpu, cuda or none), ARGS (for the demo or for pytest).

PYTHON ?= python3
TORCH ?= torch>=2.10
ARGS ?=

ifeq ($(origin VENV_PYTHON), undefined)
VENV_PYTHON := .venv/bin/python
READY := environment
else
READY := build
endif

# Each of two processes runs half of the tests, in order, and when it is done half of what the other
# has left. Their threads do not spin while they wait.
PYTEST = OMP_WAIT_POLICY=passive $(VENV_PYTHON) -m pytest -n 2 --dist worksteal

CXX_FILES = $(shell find csrc tests/simt -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

.PHONY: help demo test test-full test-oldest check format build environment environment-oldest clean

help:
	@echo "make demo         train one small GPT twice, stock PyTorch beside effkern, and show both"
	@echo "make test         formatting, lint and type checks, then all default tests"
	@echo "make test-full    the slow tests as well"
	@echo "make test-oldest  a smoke test under torch 2.10, the oldest supported, in .venv-oldest"
	@echo "make check        formatting, lint and type checks only"
	@echo "make format       bring all sources into their format"
	@echo "make build        compile what changed into effkern/lib"
	@echo "make clean        remove .venv and everything that was built"

demo: $(READY)
	@$(VENV_PYTHON) -m effkern.cli demo $(ARGS)

test: check
	@$(PYTEST) $(ARGS)

test-full: check
	@$(PYTEST) -m "slow or not slow" $(ARGS)

check: $(READY)
	@echo "== ruff format";  $(VENV_PYTHON) -m ruff format --check .
	@echo "== ruff check";   $(VENV_PYTHON) -m ruff check .
	@echo "== clang-format"; $(dir $(VENV_PYTHON))clang-format --dry-run -Werror $(CXX_FILES)
	@echo "== mypy";         $(VENV_PYTHON) -m mypy

format: $(READY)
	@$(VENV_PYTHON) -m ruff check --fix-only .
	@$(VENV_PYTHON) -m ruff format .
	@$(dir $(VENV_PYTHON))clang-format -i $(CXX_FILES)

# First the installed copy, built with the headers of 2.10; then the checkout, whose libraries were
# built with the headers of .venv's newer torch: one library serves every torch.
test-oldest: environment environment-oldest
	@.venv-oldest/bin/pytest -o pythonpath= --noconftest tests/test_smoke.py $(ARGS)
	@.venv-oldest/bin/pytest tests/test_smoke.py $(ARGS)

build: $(filter environment,$(READY))
	@$(VENV_PYTHON) setup.py -q build_ext --inplace

environment environment-oldest:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "effkern: $(PYTHON) was not found; install Python 3.10 or newer"; exit 1; }
	@$(PYTHON) scripts/setup_environment.py $(if $(filter environment,$@),--torch '$(TORCH)', \
	  --venv .venv-oldest --torch torch==2.10.0 --copy)

clean:
	rm -rf .venv .venv-oldest .venv.log .venv-oldest.log build dist effkern/lib *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
