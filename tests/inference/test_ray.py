"""`ovsam label` on a local Ray cluster, with a stand-in for the model and a worker that is killed under way."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from label_stub import FakeSegmenter
from PIL import Image

from ovsam.errors import InputError
from ovsam.inference.labelling import job
from ovsam.inference.labelling.journal import Journal, Journals
from ovsam.inference.labelling.sources import list_items

ray = pytest.importorskip("ray")

QUESTION = job.Question({"dog": "dog", "cat": "cat"})
JOB = {"model": "fake", "inputs": ["photos"], "words": QUESTION.words}
FORMATS = ("coco", "yolo", "label-studio")


class Load:
    """Loads the stand-in, and lists the process in a file."""

    def __init__(self, pids, pause):
        self.pids, self.pause = os.path.abspath(pids), pause

    def __call__(self):
        with open(self.pids, "a") as file:
            file.write(f"{os.getpid()}\n")
        fake = FakeSegmenter(pause=self.pause)
        return lambda images, **options: QUESTION.ask(fake, images, **options)


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("RAY_worker_niceness", "0")  # by default workers starve on a busy machine
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": paths},
    )
    yield
    ray.shutdown()


def finish(journal, folder):
    folder.mkdir(exist_ok=True)
    assert not job.export(Journals([journal]), folder, FORMATS, ["dog", "cat"])
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_cluster_that_cannot_be_reached(monkeypatch):
    from ovsam.inference.labelling.ray_engine import run_ray

    def refuse(**options):
        raise ConnectionError("nobody is at 127.0.0.1:1")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(InputError, match="The Ray cluster cannot be reached .nobody is at 127.0.0.1:1.; start it"):
        next(run_ray([], None))


@pytest.mark.slow
def test_a_killed_worker_costs_no_image(cluster, tmp_path, monkeypatch):
    from ovsam.inference.labelling.ray_engine import run_ray

    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    Path("photos").mkdir()
    for number in range(60):
        Image.fromarray(generator.integers(0, 255, (40, 48, 3), np.uint8)).save(f"photos/{number:03}.png")
    Path("photos/bad.png").write_text("no picture")
    todo = job.batches(list_items(["photos"]).items, 4)
    with Journal(Path("local.jsonl"), JOB) as journal:
        there = job.record(job.run_local(todo, Load("none", 0)(), 2), journal, 61, progress=False)

    def outcomes():
        for number, outcome in enumerate(run_ray(todo, Load(tmp_path / "pids", 0.5))):
            if number == 2:
                os.kill(int(Path("pids").read_text().split()[0]), signal.SIGKILL)
            yield outcome

    with Journal(Path("ray.jsonl"), JOB) as journal:
        here = job.record(outcomes(), journal, 61, progress=False)
    assert len(set(Path("pids").read_text().split())) > 1  # it was started again
    assert here == there and here.labelled == 60 and list(here.failed) == ["bad.png"]
    assert finish(Path("ray.jsonl"), Path("ray")) == finish(Path("local.jsonl"), Path("local"))
