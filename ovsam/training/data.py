"""EmojiScenes as a map-style training set: sample `i` is always the same picture, so a resumed run redraws nothing."""

import numpy as np
import torch
from torch.utils.data import Dataset

from ovsam.scenes.drawing import SceneConfig, draw_scene, sprites
from ovsam.scenes.words import all_words


class SceneDataset(Dataset):
    """Scenes of base words. Each item: image uint8 [3, H, W], index_map uint8 [H, W] (object i's pixels hold i + 1),
    word_ids int64 [max_objects], padded with -1."""

    def __init__(self, length: int, seed: int, config: SceneConfig):
        self.length, self.seed, self.config = length, seed, config
        self.word_ids = np.array([i for i, word in enumerate(all_words()) if word.split == "base"])
        sprites()  # drawn once here, so that data-loader workers share them

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        scene = draw_scene(self.seed, index, self.word_ids, self.config)
        word_ids = np.full(self.config.max_objects, -1)
        word_ids[: len(scene.word_ids)] = scene.word_ids
        image = torch.from_numpy(np.asarray(scene.image).copy())  # [H, W, 3] -> [3, H, W]
        return {
            "image": image.permute(2, 0, 1),
            "index_map": torch.from_numpy(scene.index_map),
            "word_ids": torch.from_numpy(word_ids),
        }
