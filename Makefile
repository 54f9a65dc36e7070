# Needs Python >= 3.11 with venv, and make. Everything else goes into .venv.
#
#   make run                         quantize the embedded model with awq4, verify, measure
#   make run ARGS="recipe=gptq4"     another recipe, or any Hydra override
#   make test                        the tests, ruff and mypy
#
#   PYTHON=python3.12                the interpreter the environment is made from
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu    an extra package index, here for torch without CUDA
#   EXTRAS=dev,peers                 extras to install
#   WORKERS=4                        processes that run the tests; 0: in pytest itself, which --pdb needs

PYTHON ?= python3
VENV ?= .venv
ARGS ?= recipe=awq4
PYTEST_ARGS ?= -q
WORKERS ?= 2
EXTRAS ?= dev
TORCH_INDEX ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
INDEX_OPTION := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: run test clean
.DELETE_ON_ERROR:

run: $(STAMP)
	$(PY) -m compress $(ARGS)

test: $(STAMP)
	$(PY) -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# The stamp is written last, so an interrupted install is taken up again. A working environment keeps its interpreter
# (a venv made over another one mixes the two); `make clean` lets PYTHON choose anew.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	    echo "$(PYTHON) is not there; install Python 3.11 or newer, or say make PYTHON=<its path>" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), but 3.11 or newer is needed; say make PYTHON=<its path>" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	    echo "$(PYTHON) lacks venv or ensurepip; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(if $(wildcard $(VENV)/pyvenv.cfg),--clear) $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(INDEX_OPTION) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
