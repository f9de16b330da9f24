"""Masks as COCO's compressed run lengths, {"size": [H, W], "counts": str}, made from parts of an image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco

from ovsam.errors import InputError

RLE = dict[str, Any]
PIXELS = 2**32  # an image must have fewer: COCO stores lengths of runs in 32 bits


def encode(mask: np.ndarray, x: int = 0, y: int = 0, size: tuple[int, int] | None = None) -> RLE:
    """Encode a mask [h, w] bool whose upper left pixel is x, y in an image of `size` (height, width; default: the size
    of the mask). Time and memory depend on the part, not on the image."""
    height, width = mask.shape if size is None else size
    h, w = mask.shape
    if not (0 <= x and 0 <= y and x + w <= width and y + h <= height):
        raise InputError(f"A mask of {w}x{h} pixels at {x},{y} does not fit into an image of {width}x{height}.")
    if height * width >= PIXELS:
        raise InputError(f"An image of {width}x{height} pixels is too large for masks; it must have under 2^32 pixels.")
    padded = np.zeros((w, h + 2), dtype=bool)  # COCO counts column by column
    padded[:, 1:-1] = mask.T
    column, row = np.nonzero(padded[:, 1:] != padded[:, :-1])  # where runs begin and, one further, end; in order
    turns = (column + x) * height + row + y
    if len(turns):  # a run that ends with its column continues if the next column begins with one
        through = np.flatnonzero(turns[1:-1:2] == turns[2::2])
        turns = np.delete(turns, np.concatenate([2 * through + 1, 2 * through + 2]))
    last = height * width
    counts = np.diff(turns, prepend=0, append=last).tolist()
    if len(turns) and turns[-1] == last:
        counts.pop()  # nothing follows the last run
    packed = coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": packed["counts"].decode("ascii")}


def decode(segmentation: RLE) -> np.ndarray:
    """Return the mask [H, W] as bool; raises MemoryError if it does not fit into memory."""
    height, width = segmentation["size"]
    np.empty((height, width), dtype=np.uint8)  # pycocotools crashes where it gets no memory; NumPy raises the error
    return coco.decode(segmentation).astype(bool)


def area(segmentation: RLE) -> int:
    """Area of the mask in pixels."""
    return int(coco.area(segmentation))


def bbox(segmentation: RLE) -> tuple[float, float, float, float]:
    """x, y, width, height in pixels; zeros for an empty mask."""
    x, y, width, height = coco.toBbox(segmentation).tolist()
    return x, y, width, height


def union(segmentations: Sequence[RLE]) -> RLE:
    """Union of masks of one image."""
    merged = coco.merge(list(segmentations))
    return {"size": list(merged["size"]), "counts": merged["counts"].decode("ascii")}


def iou(one: Sequence[RLE], other: Sequence[RLE]) -> np.ndarray:
    """Intersection over union of n and m masks of one image, [n, m], computed on the run lengths."""
    return _compare(one, other, crowd=0)


def covered(one: Sequence[RLE], other: Sequence[RLE]) -> np.ndarray:
    """Fraction of each of n masks that is covered by each of m others, [n, m]."""
    return _compare(one, other, crowd=1)


def _compare(one: Sequence[RLE], other: Sequence[RLE], crowd: int) -> np.ndarray:
    if not one or not other:
        return np.zeros((len(one), len(other)))
    # For a crowd pycocotools divides by the area of the first mask instead of the union; 0 / 0 if it is empty.
    return np.nan_to_num(np.asarray(coco.iou(list(one), list(other), [crowd] * len(other))))
