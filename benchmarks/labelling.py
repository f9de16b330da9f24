"""Cost of `ovsam label` relative to the bare model: throughput on the same images, and memory during a job.

    python benchmarks/labelling.py throughput [--images 40] [--threads 2]
    python benchmarks/labelling.py memory [--images 5000]

Throughput: decoded images through `Segmenter.where` in batches of 4, against the whole of a job: listing, decoding,
model, journal and COCO file, both after one batch to warm up, in turns, the best of `--rounds` each. Memory: a job of
copies of one photograph with a stub that returns five masks in place of the model, whose memory would hide that of the
job; resident memory at image 100 and at the last one.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import torch

import ovsam
from ovsam.inference.labelling import job
from ovsam.inference.labelling.journal import Journal, Journals
from ovsam.inference.labelling.sources import list_items
from ovsam.processing.images import open_image
from ovsam.results.results import Results

PHOTOS = Path(__file__).resolve().parents[1] / "tests/data/photos-val/images"
WORDS = {word: word for word in ("person", "car", "dog", "chair", "bottle")}
BATCH = 4


def throughput(count: int, rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    items = list_items([str(PHOTOS)]).items[:count]
    question = job.Question(WORDS)
    segmenter = ovsam.load("ovsam-tiny", device="cpu")
    question.prepare(segmenter)

    def ask(images, **options):
        return question.ask(segmenter, images, **options)

    images = [open_image(item.location) for item in items]
    ask(images[:BATCH])
    bare, whole = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        for place in range(0, len(images), BATCH):
            ask(images[place : place + BATCH])
        bare.append(time.perf_counter() - start)
        start = time.perf_counter()
        run(items, ask)
        whole.append(time.perf_counter() - start)
    print(f"bare model: {len(items) / min(bare):.3f} images/s")
    print(f"ovsam label: {len(items) / min(whole):.3f} images/s, {min(bare) / min(whole):.3f} of it")


def memory(count: int) -> None:
    masks = np.zeros((5, 480, 640), bool)
    for number, mask in enumerate(masks):
        mask[40 * number : 200 + 40 * number, 30 : 300 + 50 * number] = True
    labels, scores = list(WORDS), [0.9, 0.8, 0.7, 0.6, 0.5]
    seen, process = {}, psutil.Process()

    def ask(images, **options) -> list[Results]:
        seen["images"] = seen.get("images", 0) + len(images)
        if seen["images"] in (100, count):
            gc.collect()
            seen[seen["images"]] = process.memory_info().rss / 2**20
        return [
            Results.from_arrays(masks, labels, range(5), scores, scores, labels, "text", model="stand-in")
            for _ in images
        ]

    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):  # links, so that the disk does not fill
            (Path(folder) / f"{number:05}.jpg").symlink_to(next(PHOTOS.glob("*.jpg")))
        run(list_items([folder]).items, ask)
    at_end = process.memory_info().rss / 2**20
    print(f"resident at image 100: {seen[100]:.0f} MB, at image {count}: {seen[count]:.0f} MB", end="")
    print(f" ({seen[count] / seen[100]:.3f} x), after the COCO file: {at_end:.0f} MB")


def run(items: list, ask) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        with Journal(path, {"words": WORDS}) as journal:
            found: Iterator = job.run_local(job.batches(items, BATCH), ask, workers=2)
            summary = job.record(found, journal, len(items), progress=False)
        assert summary.labelled == len(items), summary.failed
        assert not job.export(Journals([path]), Path(folder), ["coco"], list(WORDS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("throughput", "memory"))
    parser.add_argument("--images", type=int, help="default: 40 for throughput, 5000 for memory")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.what == "throughput":
        throughput(args.images or 40, args.rounds, args.threads)
    else:
        memory(args.images or 5000)
