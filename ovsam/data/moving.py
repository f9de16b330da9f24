"""Moving scenes as a map-style training set: sample `i` is always the same clip, so that runs can be resumed."""

import numpy as np
import torch
from PIL import Image

from ovsam.data.base import Sample, SegmentationData
from ovsam.data.coco import Coco
from ovsam.data.scenes.moving import SEED, MovingConfig, MovingScene, Pieces
from ovsam.errors import InputError


class MovingScenes(SegmentationData):
    """Clips of moving scenes of the objects and images of a COCO file: samples have a time axis.

    - `image` uint8 [T, 3, S, S];
    - `masks` bool [O, T, S, S], `word_ids` int64 [O] and `known` as in `ovsam.data.base`.

    Args:
        annotations, images: as in Coco.
        length: number of clips.
        seed: clip i is a function of the seed and i.
        size: S, the side of the square that frames are resized to.
        max_objects: O.
        frames: T, the number of frames of a clip.
        step: distance of the frames of a clip in the scene, which has 60.
        pictograms: share of objects that are pictograms.

    Raises:
        InputError: the data have no object to cut out, a number is out of range, or the seed is that of the frozen
            scenes.
    """

    format = "moving"

    def __init__(
        self,
        annotations: str,
        images: str | None = None,
        length: int = 10_000,
        seed: int = 0,
        size: int = 512,
        max_objects: int = 5,
        frames: int = 8,
        step: int = 2,
        pictograms: float = 0.3,
    ):
        if seed == SEED:
            raise InputError(f"The seed {SEED} draws the frozen scenes, which are never trained on; choose another.")
        for name, value in (("size", size), ("max_objects", max_objects), ("step", step), ("frames", frames - 1)):
            if value < 1:
                raise InputError(f"[data] has a {name} that is too small; a clip needs two frames and one object.")
        self.config = MovingConfig(pictograms=pictograms, min_objects=2, max_objects=max_objects)
        if (frames - 1) * step >= self.config.frames:
            raise InputError(
                f"[data] has {frames} frames at a step of {step}; a scene has {self.config.frames} frames in all."
            )
        data = Coco(annotations, images)
        self.pieces = Pieces(data, self.config.styles)
        self.words, self.length, self.seed, self.size = data.words, length, seed, size
        self.max_objects, self.frames, self.step = max_objects, frames, step
        self.pictures, self.instances = length, None
        self.skipped, self.notes = data.skipped, data.notes
        self.place = {word.name: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        scene = MovingScene(self.pieces, self.seed, index, self.config)
        span = (self.frames - 1) * self.step
        start = int(np.random.default_rng((self.seed, index, 1)).integers(self.config.frames - span))
        images, masks = [], []
        for frame in range(start, start + span + 1, self.step):
            image, numbers = scene.draw(frame)
            square = (self.size, self.size)
            images.append(np.asarray(image.resize(square, Image.Resampling.BILINEAR)))
            resized = np.asarray(Image.fromarray(numbers).resize(square, Image.Resampling.NEAREST))
            masks.append(resized == np.arange(1, self.max_objects + 1)[:, None, None])  # [O, S, S]
        word_ids = torch.full((self.max_objects,), -1)
        for number, word in enumerate(scene.words[: self.max_objects]):
            word_ids[number] = self.place.get(word, -1)  # pictograms are no words of these data
        return {
            "image": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),  # [T, S, S, 3] -> [T, 3, S, S]
            "masks": torch.from_numpy(np.stack(masks, 1)),
            "word_ids": word_ids,
            "known": torch.zeros(len(self.words), dtype=torch.bool),
        }
