"""Cost of `ovsam label` relative to the bare model, and label files of a job that is killed again and again.

    python benchmarks/labelling.py throughput [--images 40] [--threads 2]
    python benchmarks/labelling.py memory [--images 5000]
    python benchmarks/labelling.py kills [--engine local|ray] [--images 500] [--kills 20]

Throughput: decoded images through `Segmenter.where` in batches of 4, against the whole of a job: listing, decoding,
model, journal and COCO file, both after one batch to warm up, in turns, the best of `--rounds` each. Memory: a job of
copies of one photograph with a stub that returns five masks in place of the model, whose memory would hide that of the
job; resident memory at image 100 and at the last one.

Kills: a random model of 0.3 M parameters labels small images without interruption, in two shards that are merged, and
with SIGKILL again and again; the label files of all formats are compared byte by byte. With Ray, the process
of the model is killed three times, then the driver, and so on. Each command is a fork of a process that has imported
torch, which saves time.
"""

import argparse
import contextlib
import gc
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

import ovsam
import ovsam_cli
from ovsam.inference.labelling import job
from ovsam.inference.labelling.journal import Journal, Journals
from ovsam.inference.labelling.sources import list_items
from ovsam.processing.images import open_image
from ovsam.results.formats import FORMATS
from ovsam.results.results import Results

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT / "tests/data/photos-val/images"
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


def kills(engine: str, count: int, times: int) -> None:
    torch.set_num_threads(1)
    random.seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny_model(folder / "model")
        photos = sorted(PHOTOS.glob("*.jpg"))
        (folder / "images").mkdir()
        for number in range(count):
            with Image.open(photos[number % len(photos)]) as image:
                image.resize((160, 120)).rotate(number).save(folder / f"images/{number:04}.png")
        (folder / "images/bad.png").write_text("no image")
        labels = ["--text", *WORDS, "--threshold", "0.3", "--model", str(folder / "model")]
        labels += ["--format", ",".join(FORMATS)]

        def start(output: str, *options: str) -> int:
            command = ["label", str(folder / "images"), *labels, "-o", str(folder / output), *options]
            return fork(command, folder / "log.txt")

        assert wait(start("whole")) == 1  # an image is no image
        whole = files_of(folder / "whole")
        print(f"uninterrupted: {count} images, {len(whole)} label files", flush=True)

        if engine == "local":
            for shard in ("1/2", "2/2"):
                assert wait(start("shards", "--shard", shard)) in (0, 1)
            merge = ["label", "--merge", str(folder / "shards"), "-o", str(folder / "merged"), *labels[-2:]]
            assert wait(fork(merge, folder / "log.txt")) == 1
            print(f"two shards, merged: {compare(whole, files_of(folder / 'merged'))}", flush=True)

        with cluster(folder) if engine == "ray" else contextlib.nullcontext() as head:
            size, journal, killed = (folder / "whole/journal.jsonl").stat().st_size, folder / "killed/journal.jsonl", []
            driver = start("killed", "--engine", engine)
            for number in range(times):
                aim = size * (number + random.random()) / times
                by_worker, worker = engine == "ray" and number % 4, None
                while not journal.exists() or journal.stat().st_size < aim or (by_worker and not worker):
                    assert os.waitpid(driver, os.WNOHANG) == (0, 0), (folder / "log.txt").read_text()
                    time.sleep(0.01)
                    worker = model_process(head) if by_worker else None
                if worker:
                    worker.kill()
                    killed.append("worker")
                else:
                    os.kill(driver, signal.SIGKILL)
                    os.waitpid(driver, 0)
                    killed.append("driver")
                    driver = start("killed", "--engine", engine)
                print(f"  kill {len(killed)}: {killed[-1]}, {journal.stat().st_size / size:.0%} done", flush=True)
            assert wait(driver) == 1
        counts = ", ".join(f"{killed.count(one)} of the {one}" for one in dict.fromkeys(killed))
        print(f"{engine}, {len(killed)} kills ({counts}): {compare(whole, files_of(folder / 'killed'))}")


def save_tiny_model(folder: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    import common

    common.tiny_model(proposal_threshold=0.3, mask_nms_threshold=0.5).save_pretrained(folder)
    common.tiny_processor().save_pretrained(folder)


def fork(command: list[str], log: Path) -> int:
    """Run a command of the command line in a child; returns its process id. What it prints is written to the log."""
    if process := os.fork():
        return process
    code = 70  # of an error
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        code = ovsam_cli.main(command)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def files_of(output: Path) -> dict[str, bytes]:
    """The label files and the list of errors of a job, without its journal."""
    paths = [path for path in output.rglob("*") if path.is_file() and not path.name.startswith(("journal", "errors-"))]
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in paths}


def compare(expected: dict[str, bytes], found: dict[str, bytes]) -> str:
    different = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if different:
        return f"{len(different)} of {len(expected)} files differ, such as {different[0]}"
    return f"identical bytes in all {len(expected)} files"


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[psutil.Process]:
    """A Ray cluster of this machine alone, which outlives its drivers."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # for the drivers too
    environment = os.environ | {"RAY_worker_niceness": "0", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0", "--num-cpus=2"]
    command += ["--include-dashboard=false", "--object-store-memory=100000000"]
    with open(folder / "ray.log", "w+") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            while "--address=" not in (text := (folder / "ray.log").read_text()):
                assert head.poll() is None, text
                time.sleep(0.2)
            os.environ["RAY_ADDRESS"] = text.split("--address='")[1].split("'")[0]
            yield psutil.Process(head.pid)
        finally:
            processes = [head, *psutil.Process(head.pid).children(recursive=True)]
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.kill()


def model_process(head: psutil.Process) -> psutil.Process | None:
    """The process of the cluster that holds the model, if it runs."""
    for process in head.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "MapWorker" in "".join(process.cmdline()):
                return process
    return None


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
    parser.add_argument("what", choices=("throughput", "memory", "kills"))
    parser.add_argument("--images", type=int, help="default: 40 for throughput, 5000 for memory, 500 for kills")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--kills", type=int, default=20)
    args = parser.parse_args()
    if args.what == "throughput":
        throughput(args.images or 40, args.rounds, args.threads)
    elif args.what == "kills":
        kills(args.engine, args.images or 500, args.kills)
    else:
        memory(args.images or 5000)
