"""EmojiScenes as a map-style training set: sample `i` is always the same picture, so a resumed run redraws nothing."""

import numpy as np
import torch

from ovsam.scenes.drawing import SceneConfig, draw_scene, sprites
from ovsam.scenes.words import all_words

from .base import Sample, SegmentationData


class SceneDataset(SegmentationData):
    """Scenes of base words, every one annotated for all words.

    Args:
        length: how many scenes there are.
        seed: scene i is a function of it and i.
        config: how they are drawn.
    """

    format = "emojiscenes"

    def __init__(self, length: int, seed: int, config: SceneConfig):
        self.length, self.seed, self.config = length, seed, config
        self.words = list(all_words())
        self.word_ids = np.array([i for i, word in enumerate(self.words) if word.split == "base"])
        self.pictures, self.instances = length, None  # nobody has counted objects that are not drawn yet
        self.size, self.max_objects = config.canvas, config.max_objects
        self.skipped, self.notes = [], []
        sprites()  # drawn once here, so that data-loader workers share them

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        scene = draw_scene(self.seed, index, self.word_ids, self.config)
        word_ids = np.full(self.max_objects, -1)
        word_ids[: len(scene.word_ids)] = scene.word_ids
        image = torch.from_numpy(np.asarray(scene.image).copy())  # [H, W, 3] -> [3, H, W]
        return {
            "image": image.permute(2, 0, 1),
            "masks": torch.from_numpy(scene.index_map == np.arange(1, self.max_objects + 1)[:, None, None]),
            "word_ids": torch.from_numpy(word_ids),
            "known": torch.ones(len(self.words), dtype=torch.bool),
        }


def open_scenes(length: int = 100_000, seed: int = 0, size: int | None = None, **scene) -> SceneDataset:
    """Scenes by a recipe's keys: those of SceneConfig, with `size` as another name for `canvas`."""
    canvas = {} if size is None else {"canvas": size}
    return SceneDataset(length, seed, SceneConfig(**canvas, **scene))
