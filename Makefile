# make try    a picture of this repository, segmented by words
# make test   lint, types and the whole suite
# make bench  what words, prompts and everything cost and find; a quarter of an hour on an idle machine
# make -j2 tiny   trains ovsam-tiny's parts again, those that are not in runs/ yet; stopped at any moment, it goes on
# All make .venv first. PYTHON=python3.12 chooses the interpreter; TRY_WORDS='fork "hair pick"' asks for other words.

PYTHON ?= python3
TRY_IMAGE ?= 028.jpg
TRY_WORDS ?= car saxophone "dog face" "meat on bone"

.PHONY: try test bench tiny
.DELETE_ON_ERROR:

try: .venv/bin/python
	.venv/bin/python -m pip install -e .
	.venv/bin/ovsam segment tests/data/emojiscenes-val/images/$(TRY_IMAGE) --text $(TRY_WORDS) --model ovsam-tiny -o try-result.png

test: .venv/bin/python
	.venv/bin/python -m pip install -e ".[test,train]"
	.venv/bin/python -m ruff check
	.venv/bin/python -m ruff format --check
	.venv/bin/python -m mypy
	.venv/bin/python -m pytest -q -n 2 --dist loadfile

bench: .venv/bin/python
	.venv/bin/python -m pip install -e .
	.venv/bin/python benchmarks/decode_speed.py --prompts 64 --threads 2
	.venv/bin/python benchmarks/speed.py
	.venv/bin/python benchmarks/race.py
	.venv/bin/python benchmarks/recall.py
	.venv/bin/python benchmarks/video.py speed

# Each recipe after those it starts from; SETTINGS="--set optim.batch_size=64" is passed on to all of them.
tiny: runs/clip2sam-tiny/model.safetensors runs/sam2clip-tiny/model.safetensors

runs/%/model.safetensors: | .venv/bin/python
	.venv/bin/ovsam train adapters/$*/recipe.toml --resume $(SETTINGS)

runs/sam-tiny-512/model.safetensors: runs/sam-tiny/model.safetensors
runs/adapters-tiny/model.safetensors: runs/clip-tiny/model.safetensors
runs/concepts-tiny/model.safetensors: runs/adapters-tiny/model.safetensors
runs/clip2sam-tiny/model.safetensors: runs/concepts-tiny/model.safetensors runs/sam-tiny-512/model.safetensors
runs/sam2clip-tiny/model.safetensors: runs/concepts-tiny/model.safetensors runs/sam-tiny-512/model.safetensors

.venv/bin/python:
	$(PYTHON) -m venv .venv
