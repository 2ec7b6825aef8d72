# Commands of this repository. `make quickstart` and `make test` need nothing but Python 3.10 or later.
# pip's own variables are honoured: PIP_INDEX_URL, PIP_FIND_LINKS (say, for a CPU build of torch), ...
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# With the tests' own tools, and all the clients that the models are tested with.
INSTALLED_DEV := $(VENV)/.installed-dev
SOURCES := modeling_grassmann trainer_scripts benchmarks tests
QUICKSTART := runs/quickstart
QUICKSTART_NLI := runs/quickstart_nli

.PHONY: quickstart quickstart-nli test test-slow bench style check-style clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), f"Python 3.10 or later is needed, this is {sys.version}"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[reports]"
	touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

quickstart: $(INSTALLED)  ## train a small language model on the documentation of Python's standard library, and generate
	$(BIN)/python trainer_scripts/run_clm.py configuration/quickstart/stdlib_docs.yaml --output_dir $(QUICKSTART)
	$(BIN)/python trainer_scripts/quickstart.py $(QUICKSTART)

quickstart-nli: $(INSTALLED)  ## train a small classifier of sentence pairs whose labels follow by logic, and check it
	$(BIN)/python trainer_scripts/run_nli.py configuration/quickstart/entailment_pairs.yaml --output_dir $(QUICKSTART_NLI)
	$(BIN)/python trainer_scripts/quickstart_nli.py $(QUICKSTART_NLI)

test: $(INSTALLED_DEV) check-style  ## all that CI runs
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-slow: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -m "slow and not gpu"

bench: $(INSTALLED)  ## time and memory of the mixer
	$(BIN)/python benchmarks/mixer.py

style: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

check-style: $(INSTALLED_DEV)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

clean:
	rm -rf $(VENV) build runs *.egg-info
