# make try    segments a photograph of this repository by text queries
# make test   lint, types and all tests
# make bench  cost and recall of text queries, prompts and everything; about an hour on an idle machine
# make tiny   trains the parts of ovsam-tiny that are not in runs/ yet; an interrupted run continues
# All make .venv first. PYTHON=python3.12 chooses the interpreter; TRY_WORDS='book fork' sets the text queries.

PYTHON ?= python3
TRY_IMAGE ?= 000000121647.jpg
TRY_WORDS ?= pizza "wine glass"

.PHONY: try test bench tiny
.DELETE_ON_ERROR:

try: .venv/bin/python
	.venv/bin/python -m pip install -e .
	.venv/bin/ovsam segment tests/data/photos-val/images/$(TRY_IMAGE) --text $(TRY_WORDS) --model ovsam-tiny -o try-result.png

test: .venv/bin/python
	.venv/bin/python -m pip install -e ".[test,train]"
	.venv/bin/python -m ruff check
	.venv/bin/python -m ruff format --check
	.venv/bin/python -m mypy
	.venv/bin/python -m pytest -q -n 2 --dist loadfile

bench: .venv/bin/python
	.venv/bin/python -m pip install -e ".[bench]"
	.venv/bin/python benchmarks/race.py
	.venv/bin/python benchmarks/race_cuda.py
	.venv/bin/python benchmarks/decode_speed.py --prompts 64 --threads 2
	.venv/bin/python benchmarks/speed.py
	.venv/bin/python benchmarks/recall.py
	.venv/bin/python benchmarks/video.py speed

# The parts of ovsam-tiny that are not in runs/ yet; SETTINGS="--set optim.batch_size=64" is passed on to the recipes.
tiny: runs/sam2clip-tiny/model.safetensors
	.venv/bin/python hub/build.py
	.venv/bin/ovsam train adapters/calibrate-tiny/recipe.toml
	.venv/bin/python hub/build.py

data/photographs/train.json: | .venv/bin/python
	.venv/bin/python adapters/photographs/fetch.py

runs/tower/model.safetensors: | .venv/bin/python
	.venv/bin/python hub/tower.py

runs/concepts-tiny/model.safetensors: runs/tower/model.safetensors data/photographs/train.json
	.venv/bin/ovsam train adapters/concepts-tiny/recipe.toml --resume $(SETTINGS)

runs/sam2clip-tiny/model.safetensors: runs/concepts-tiny/model.safetensors
	.venv/bin/ovsam train adapters/sam2clip-tiny/recipe.toml --resume $(SETTINGS)

.venv/bin/python:
	$(PYTHON) -m venv .venv
