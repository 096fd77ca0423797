# make demo   sets up .venv, trains a model with and without SIRE, draws runs/demo/demo.png: two minutes on two cores
# make test   sets up .venv, runs the tests but the long ones: eight minutes
# make proof  the long ones, on which nothing else depends
# make test-torch  what depends on torch the most, with the oldest that is supported; TORCH=2.12.0 with another
# make bench  sets up .venv, measures against torch and others into bench/results: seven minutes on two quiet cores
# make docs   the documentation as a site, into site/
# make lint   ruff, clang-format, mypy; make format applies the first two
PYTHON ?= python3
TORCH ?= 2.9.0
BIN := .venv/bin
CSRC := $(wildcard csrc/*.* csrc/cuda/*.*)
# two tests at a time, whose threads do not spin while they wait: there are more of them than cores
PYTEST = OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/pytest -q --benchmark-disable -n 2 --dist worksteal

.PHONY: demo test proof test-torch bench docs lint format clean

# an environment with no more than is asked for, set up again only when what was installed has changed; modules are
# compiled when they are imported, since most never are
.venv/demo: EXTRAS = train
.venv/ready: EXTRAS = test,lint
.venv/bench: EXTRAS = test,lint,rivals
.venv/proof: EXTRAS = test,lint,others,rivals
.venv/docs: EXTRAS = test,lint,docs
.venv/ready: HOLDS = .venv/demo
.venv/bench .venv/docs: HOLDS = .venv/demo .venv/ready
.venv/proof: HOLDS = .venv/demo .venv/ready .venv/bench
.venv/demo .venv/ready .venv/bench .venv/proof .venv/docs: pyproject.toml setup.py .constraints.txt $(CSRC)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint .constraints.txt --editable ".[$(EXTRAS)]"
	touch $(HOLDS) $@

demo: .venv/demo
	$(BIN)/sire-fast demo --out runs/demo --force

test: .venv/ready
	$(PYTEST) -m "not proof"

proof: .venv/proof
	$(PYTEST) -m proof

.venv-$(TORCH)/ready test-torch: BIN := .venv-$(TORCH)/bin
.venv-$(TORCH)/ready: pyproject.toml setup.py $(CSRC)
	$(PYTHON) -m venv .venv-$(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile torch==$(TORCH) --editable ".[test]"
	touch $@

test-torch: .venv-$(TORCH)/ready
	$(PYTEST) -m "not proof" tests/test_cells.py tests/test_dropin.py tests/test_layers.py tests/test_ledger.py \
		tests/test_reference.py

bench: .venv/bench
	$(BIN)/python -m bench.suite

docs: .venv/docs
	$(BIN)/mkdocs build --strict --quiet

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC) tests/*.h
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC) tests/*.h

clean:
	rm -rf .venv .venv-* build dist runs site *.egg-info sire_fast/*.so
