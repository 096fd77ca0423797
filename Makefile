# make demo   sets up .venv, trains a model with and without SIRE, draws runs/demo/demo.png
# make test   sets up .venv, runs the tests
# make bench  sets up .venv, measures against torch and others into bench/results: five minutes on two quiet cores
# make docs   the documentation as a site, into site/
# make lint   ruff and clang-format; make format applies both
PYTHON ?= python3
BIN := .venv/bin
CSRC := $(wildcard csrc/*.* csrc/cuda/*.*)

.PHONY: demo test bench docs lint format clean

# set up again only when what was installed has changed
.venv/ready: pyproject.toml setup.py .constraints.txt $(CSRC)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint .constraints.txt --editable ".[test,lint]"
	touch $@

demo: .venv/ready
	$(BIN)/sire-fast demo --out runs/demo --force

test: .venv/ready
	$(BIN)/pytest -q --benchmark-disable

bench: .venv/ready
	$(BIN)/python -m bench.suite

docs: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint .constraints.txt --editable ".[docs]"
	$(BIN)/mkdocs build --strict --quiet

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC) tests/*.h

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC) tests/*.h

clean:
	rm -rf .venv build dist runs site *.egg-info sire_fast/*.so
