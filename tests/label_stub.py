"""A stand-in for the model, and `ovsam label` with it as a program of its own, which starts without torch."""

import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import ovsam_cli

    ovsam_cli._import_bare("ovsam")

from ovsam.errors import InputError  # noqa: E402
from ovsam.ops import rle  # noqa: E402
from ovsam.results.formats.base import LabelledImage  # noqa: E402


class FakeSegmenter:
    """Returns a box for each word; its position and score depend on the pixels and on the batch of the image."""

    name = "fake"

    def __init__(self, pause=0.0, largest=1 << 30):
        self.pause, self.largest, self.batches = pause, largest, []
        self.embedded = []

    def embed(self, words):
        self.embedded.append(words)
        if "?" in words:
            raise InputError("The phrase '?' is too long.")

    def encode(self, images, batch_size):
        self.batches.append(len(images))
        assert batch_size == len(images)
        if sum(image.width * image.height for image in images) > self.largest:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99999999999 bytes.")
        mean = np.mean([np.asarray(image).mean() for image in images])
        return [(image, mean) for image in images]

    def where(self, encoded, words, tile=None, **options):
        time.sleep(self.pause)
        if tile:
            self.batches.append(f"tile {tile}")
            if tile * tile > self.largest:
                raise RuntimeError("CUDA out of memory.")
            encoded = [(image, 0) for image in encoded]
        return [self._find(image, mean, words) for image, mean in encoded]

    def everything(self, encoded, words=None, **options):
        return self.where(encoded, words)

    def _find(self, image, mean, words):
        pixels = np.asarray(image)
        if (pixels[0, 0] == [1, 2, 3]).all():
            raise ZeroDivisionError("this picture breaks the model")
        x = int(pixels.sum()) % (image.width // 2)
        found = LabelledImage((image.height, image.width), None, model="fake")
        for number, label in enumerate(words.labels):
            mask = np.zeros((18, 12), bool)
            mask[:] = True
            mask[3:7, 2:6] = False
            score = (1 + mean + number) / 300
            found.add(label, number, rle.encode(mask, x, 2, found.size), score=score, source="text")
        return found


if __name__ == "__main__":

    def load(model, device=None):
        print("loaded", flush=True)
        return FakeSegmenter(pause=0.01)

    sys.modules["ovsam"].load = load
    ovsam_cli._bare.clear()  # so that the real one is not imported
    sys.exit(ovsam_cli.main(["label", *sys.argv[1:]]))
