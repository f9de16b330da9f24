"""One instance that was found in an image."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ovsam.ops import rle


@dataclass(frozen=True, slots=True)
class Instance:
    """One object in an image.

    `id` counts from 1 within its image; `label_id` is the label's index in the vocabulary. `score` is the calibrated
    probability of the label and `mask_score` the predicted IoU of the mask, both in [0, 1]. `prompt` is the text
    query, or the clicks or the box in pixels; `source` is "text", "point", "box", "mask", "auto", or "file" where a
    label file does not tell. `bbox` is x, y, width, height, and `area` a count, in pixels. `segmentation` is the mask
    [H, W] as COCO's compressed RLE, its counts a string. `topk` holds the best labels with their scores, highest first.
    `objectness` is the probability of being an object of any class, None for prompted instances.
    """

    id: int
    label: str
    label_id: int
    score: float
    mask_score: float
    prompt: Any
    source: str
    bbox: tuple[float, float, float, float]
    area: int
    segmentation: dict[str, Any]
    topk: list[tuple[str, float]]
    objectness: float | None = None

    @property
    def mask(self) -> np.ndarray:
        """The mask [H, W] as bool, decoded anew at each call."""
        return rle.decode(self.segmentation)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """`bbox` as corners: x1, y1, x2, y2."""
        x, y, width, height = self.bbox
        return x, y, x + width, y + height
