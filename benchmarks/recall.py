"""Recall of ovsam-tiny beyond `ovsam eval`: fewer locations, other proposers, exemplars, small objects in large images;
and the memory of large images.

    python benchmarks/recall.py [--scenes 30] [--only locations proposers exemplars tiles memory]

Recall is the fraction of objects that a returned mask overlaps with an IoU over one half.
"""

import argparse
import resource
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import pipeline

import ovsam
from ovsam.data.scenes.drawing import SceneConfig, draw_scene
from ovsam.data.scenes.words import all_words
from ovsam.evaluation.datasets import open_coco
from ovsam.ops import rle
from ovsam.ops.masks import mask_overlap

FROZEN = Path(__file__).resolve().parents[1] / "tests" / "data" / "emojiscenes-val"
SEED = 810_000  # of the large images: used by no recipe and not by the frozen set
BASE = np.array([i for i, word in enumerate(all_words()) if word.split == "base"])


class Frozen:
    """The first scenes of the frozen set."""

    def __init__(self, count: int):
        self.coco = open_coco(FROZEN / "annotations.json")
        self.ids = sorted(self.coco.imgs)[:count]

    def __iter__(self):
        for image_id in self.ids:
            objects = self.coco.loadAnns(self.coco.getAnnIds(image_id))
            masks = np.array([self.coco.annToMask(a) for a in objects], dtype=bool)
            names = [self.coco.cats[a["category_id"]]["name"] for a in objects]
            yield FROZEN / self.coco.imgs[image_id]["file_name"], masks, names


def hits(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Masks [n, H, W], [m, H, W] -> for each of the m, whether it was found."""
    if not len(found):
        return np.zeros(len(truth), dtype=bool)
    return (mask_overlap(torch.from_numpy(found), torch.from_numpy(truth)).amax(0) > 0.5).numpy()


def of_words(results: ovsam.Results, truth: np.ndarray, names: list[str]) -> np.ndarray:
    """As `hits`, by masks of the right word."""
    found = np.zeros(len(names), dtype=bool)
    for name in set(names):
        own = np.array([each == name for each in names])
        found[own] = hits(results.filter(labels=[name]).masks, truth[own])
    return found


def locations(segmenter: ovsam.Segmenter, frozen: Frozen) -> None:
    """300 locations against all of them."""
    found: dict[int, list] = {300: [], 0: []}
    for path, truth, names in frozen:
        image = segmenter.encode(path)
        for count in found:
            segmenter.model.config.max_locations = count
            found[count] += of_words(segmenter.where(image, list(dict.fromkeys(names))), truth, names).tolist()
    segmenter.model.config.max_locations = 300
    few, all_of_them = np.mean(found[300]), np.mean(found[0])
    print(f"words -> masks, recall: {few:.4f} by 300 locations, {all_of_them:.4f} by all 1,280; "
          f"lost {100 * (1 - few / all_of_them):.2f} %")  # fmt: skip


def proposers(segmenter: ovsam.Segmenter, frozen: Frozen) -> None:
    """Everything by each proposer, and transformers' mask-generation over the same SAM side."""
    generate = pipeline("mask-generation", model=segmenter.model, processor=segmenter.processor,
                        image_processor=segmenter.processor.image_processor)  # fmt: skip

    def stock(path: Path) -> np.ndarray:
        masks = generate(Image.open(path), points_per_batch=64, pred_iou_thresh=0.7, stability_score_thresh=0.8)[
            "masks"
        ]
        return np.array([np.asarray(mask, dtype=bool) for mask in masks]).reshape(-1, 512, 512)

    ways = {
        "concepts": lambda path: segmenter.everything(path).masks,
        "concepts, unrefined": lambda path: segmenter.everything(path, refine=False).masks,
        "clip-dense, the checkpoint's words": lambda path: segmenter.everything(path, proposer="clip-dense").masks,
        "mask-generation, 32 x 32, IoU 0.7, stability 0.8": stock,
    }
    found = {name: ([], [], []) for name in ways}
    for path, truth, _ in frozen:
        for name, ask in ways.items():
            start = time.perf_counter()
            masks = ask(path)
            seconds = time.perf_counter() - start
            recalled, counts, times = found[name]
            recalled += hits(masks, truth).tolist()
            counts.append(len(masks))
            times.append(seconds)
    for name, (recalled, counts, times) in found.items():
        print(f"everything by {name:<50} recall {np.mean(recalled):.3f}, {np.mean(counts):5.1f} masks, "
              f"{np.median(times):.2f} s an image")  # fmt: skip


def exemplars(segmenter: ovsam.Segmenter) -> None:
    """Search with the box of an object in one scene, in scenes with and without that word. Scenes of 60 words."""
    scenes = [draw_scene(SEED + 2, index, BASE[::20], SceneConfig(min_size=48)) for index in range(24)]
    encoded = [segmenter.encode(scene.image) for scene in scenes]
    found, false = [], []
    for scene, image in zip(scenes, encoded, strict=True):
        word = scene.word_ids[0]
        x, y, width, height = rle.bbox(rle.encode(scene.index_map == 1))
        example = (image, [x, y, x + width, y + height])
        others = [pair for pair in zip(scenes, encoded, strict=True) if pair[0] is not scene]
        for other, picture in [pair for pair in others if word in pair[0].word_ids][:4]:
            own = np.array([other.index_map == i + 1 for i, each in enumerate(other.word_ids) if each == word])
            found += hits(segmenter.where(picture, exemplars=[example]).masks, own).tolist()
        for _, picture in [pair for pair in others if word not in pair[0].word_ids][:4]:
            false.append(len(segmenter.where(picture, exemplars=[example])) > 0)
    print(f"an exemplar of another image: recall {np.mean(found):.3f} ({len(found)} objects), "
          f"images without the object that return anything: {np.mean(false):.3f} ({len(false)})")  # fmt: skip


def tiles(segmenter: ovsam.Segmenter) -> None:
    """Objects of 16 to 32 pixels in images of 2,048."""
    config = SceneConfig(canvas=2048, min_objects=60, max_objects=80, min_size=16, max_size=32)
    for tile in (None, 512, 256):
        recalled, doubled, start = [], 0, time.perf_counter()
        for index in range(3):
            scene = draw_scene(SEED, index, BASE, config)
            truth = [rle.encode(scene.index_map == i + 1) for i in range(len(scene.word_ids))]
            found = [one.segmentation for one in segmenter.everything(scene.image, tile=tile, objectness=0.3)]
            overlap = rle.iou(found, truth) if found else np.zeros((1, len(truth)))
            recalled += (overlap.max(0) > 0.5).tolist()
            doubled += int(((overlap > 0.5).sum(0) > 1).sum())
        print(f"16-32 px in 2,048 px, tile {tile}: recall {np.mean(recalled):.3f} of {len(recalled)}, "
              f"{doubled} found twice, {(time.perf_counter() - start) / 3:.1f} s an image")  # fmt: skip


def memory(segmenter: ovsam.Segmenter) -> None:
    """Resident memory above the loaded model, 12 megapixels with 300 objects, in tiles and whole."""
    image = Image.new("RGB", (4000, 3000))
    config = SceneConfig(canvas=1000, min_objects=25, max_objects=25, min_size=40, max_size=120)
    for place in range(12):
        scene = draw_scene(SEED + 1, place, BASE, config)
        image.paste(scene.image, (place % 4 * 1000, place // 4 * 1000))
    segmenter.everything(image.resize((512, 512)))  # allocations of the first call count as the model's
    for tile in (None, 512):
        peak = Peak()
        with peak:
            found = segmenter.everything(image, tile=tile)
        print(f"12 megapixels, 300 objects, tile {tile}: {len(found)} found, "
              f"{peak.megabytes / 1000:.2f} GB above the model")  # fmt: skip


class Peak:
    """The highest resident memory above that at the start, in MB, sampled every 10 ms."""

    def __enter__(self):
        self.start, self.highest, self.stop = self._resident(), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        self.megabytes = (self.highest - self.start) / 1e6

    def _watch(self):
        while not self.stop.wait(0.01):
            self.highest = max(self.highest, self._resident())

    def _resident(self) -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=30, help="of the frozen set")
    kinds = ("locations", "proposers", "exemplars", "tiles", "memory")
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    segmenter, frozen = ovsam.load("ovsam-tiny"), Frozen(arguments.scenes)
    for kind in arguments.only:
        ask = globals()[kind]
        ask(segmenter, frozen) if kind in ("locations", "proposers") else ask(segmenter)


if __name__ == "__main__":
    main()
