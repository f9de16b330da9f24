# make try    a picture of this repository, segmented by words
# make test   lint, types and the whole suite
# make bench  what words, prompts and everything cost and find; a quarter of an hour on an idle machine
# All make .venv first. PYTHON=python3.12 chooses the interpreter; TRY_WORDS='fork "hair pick"' asks for other words.

PYTHON ?= python3
TRY_IMAGE ?= 028.jpg
TRY_WORDS ?= car saxophone "dog face" "meat on bone"

.PHONY: try test bench
.DELETE_ON_ERROR:

try: .venv/bin/python
	.venv/bin/python -m pip install -e .
	.venv/bin/ovsam segment tests/data/emojiscenes-val/images/$(TRY_IMAGE) --text $(TRY_WORDS) --model ovsam-tiny -o try-result.png

test: .venv/bin/python
	.venv/bin/python -m pip install -e ".[test,train]"
	.venv/bin/python -m ruff check
	.venv/bin/python -m ruff format --check
	.venv/bin/python -m mypy
	.venv/bin/python -m pytest -q

bench: .venv/bin/python
	.venv/bin/python -m pip install -e .
	.venv/bin/python benchmarks/decode_speed.py --prompts 64 --threads 2
	.venv/bin/python benchmarks/speed.py
	.venv/bin/python benchmarks/recall.py

.venv/bin/python:
	$(PYTHON) -m venv .venv
