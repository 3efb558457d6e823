# Every target makes its own virtual environment in $(VENV) when there is none.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test lint types check real browser benchmark quality clean

demo: $(READY)          # convert the embedded model four ways and verify each
	$(BIN)/upcycle demo demo-out

test: $(READY)          # every test that needs no download
	$(BIN)/python -P -m pytest -n 2 --dist worksteal -m "not real"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy -p upcycle

check: lint types test

real: $(READY)          # the checks on SmolLM2-135M (downloads 93 MB once)
	$(BIN)/python -P -m pytest -m real tests/end_to_end

browser: $(READY)       # the report in headless Chromium (apt-get install chromium)
	$(BIN)/python -P -m pytest -m browser tests/report

benchmark: $(READY)     # against mergekit, plain copying and k-means-constrained; about 20 minutes and 40 GB of disk
	$(BIN)/python -P tests/benchmarks/against_mergekit.py
	$(BIN)/python -P tests/benchmarks/large_split.py
	$(BIN)/python -P tests/benchmarks/clustering.py

quality: $(READY)       # split recipes and every splitting method on SmolLM2-135M, all layers; about an hour
	$(BIN)/python -P tests/benchmarks/split_quality.py
	$(BIN)/python -P tests/benchmarks/compare_smollm2.py

$(READY): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist demo-out *.egg-info
