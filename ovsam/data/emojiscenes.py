"""EmojiScenes as a map-style training set: sample `i` is always the same image, so that runs can be resumed."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ovsam.data.base import Sample, SegmentationData
from ovsam.data.scenes.drawing import SceneConfig, draw_scene
from ovsam.data.scenes.styles import HELD_OUT, drawable
from ovsam.data.scenes.words import all_words
from ovsam.errors import InputError


class SceneDataset(SegmentationData):
    """Scenes of base words, annotated for all words.

    Args:
        length: number of scenes.
        seed: scene i is a function of the seed and i.
        config: settings of the drawing.
        vocabulary: base words that are drawn and known; a list, or a text file with one a line; default: all.

    Raises:
        InputError: a style is reserved for testing, or a word of the vocabulary cannot be drawn.
    """

    format = "emojiscenes"

    def __init__(self, length: int, seed: int, config: SceneConfig, vocabulary: Sequence[str] | str | None = None):
        self.length, self.seed, self.config = length, seed, config
        self.words = list(all_words())
        if unseen := set(config.styles) & set(HELD_OUT):
            raise InputError(f"The style {', '.join(sorted(unseen))} is reserved for testing; train on other styles.")
        drawn = drawable(config.styles)  # once here, so that data-loader workers share the sprites
        self.word_ids = np.array([i for i in drawn if self.words[i].split == "base"])  # among all_words()
        # Number of novel words in each scene, and their ids: 0 in training, more in calibration.
        self.novel, self.novel_ids = 0, np.array([i for i in drawn if self.words[i].split == "novel"])
        self.place = np.arange(len(self.words))  # index in `words` of each word of all_words()
        if vocabulary is not None:
            ids = self._read(vocabulary)
            self.words, self.word_ids = [self.words[i] for i in ids], np.array(ids)
            self.novel_ids = self.novel_ids[:0]
            self.place[ids] = np.arange(len(ids))
        self.pictures, self.instances = length, None  # the number of objects is unknown before scenes are drawn
        self.size, self.max_objects = config.canvas, config.max_objects
        self.skipped, self.notes = [], []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        novel = np.random.default_rng((self.seed, index, 1)).choice(self.novel_ids, self.novel, replace=False).tolist()
        scene = draw_scene(self.seed, index, self.word_ids, self.config, novel)
        word_ids = np.full(self.max_objects, -1)
        word_ids[: len(scene.word_ids)] = self.place[scene.word_ids]
        image = torch.from_numpy(np.asarray(scene.image).copy())  # [H, W, 3] -> [3, H, W]
        return {
            "image": image.permute(2, 0, 1),
            "masks": torch.from_numpy(scene.index_map == np.arange(1, self.max_objects + 1)[:, None, None]),
            "word_ids": torch.from_numpy(word_ids),
            "known": torch.ones(len(self.words), dtype=torch.bool),
        }

    def _read(self, vocabulary: Sequence[str] | str) -> list[int]:
        """Return the indices of the vocabulary in `all_words()`."""
        if isinstance(vocabulary, str):
            if not os.path.isfile(vocabulary):
                raise InputError(f"vocabulary is {vocabulary}, which is not a file; give a file or a list of names.")
            vocabulary = Path(vocabulary).read_text(encoding="utf-8").split("\n")
        names = [name.strip() for name in vocabulary if name.strip()]
        place = {self.words[i].name: i for i in self.word_ids}
        if missing := [name for name in names if name not in place]:
            raise InputError(f"vocabulary has {missing[0]!r}, which is not a base word with a drawing in these styles.")
        if not names or len(set(names)) < len(names):
            raise InputError("vocabulary needs at least one name, and each of them once.")
        return [place[name] for name in names]


def open_scenes(
    length: int = 100_000,
    seed: int = 0,
    size: int | None = None,
    vocabulary: Sequence[str] | str | None = None,
    **scene,
) -> SceneDataset:
    """Open scenes by the keys of a recipe: those of SceneConfig, with `size` as another name for `canvas`, and
    `vocabulary`."""
    config = SceneConfig(**scene) if size is None else SceneConfig(canvas=size, **scene)
    return SceneDataset(length, seed, config, vocabulary)
