"""Masks as smooth outlines, which a browser draws. Downloads hold the masks themselves."""

import math
from functools import lru_cache

import numpy as np

from ovsam.ops import rle
from ovsam.ops.polygons import outlines, simplify
from ovsam.results.instance import Instance

DRAWN_SIDE = 1024  # px; outlines are as fine as in an image of this size
CORNER = 2.0  # steps from a corner of two long sides that are cut off
STRAY = 0.5  # steps by which an outline may stray from that
ROUND = 6.0  # steps from a corner at which its rounding begins, at most


def to_path(instance: Instance) -> str:
    """The mask of an instance as the path of an SVG in pixels of the image, for the even-odd rule."""
    height, width = instance.segmentation["size"]
    return _path(instance.segmentation["counts"], height, width)


@lru_cache(4096)  # every slider and every click draws all objects again
def _path(counts: str, height: int, width: int) -> str:
    mask = {"size": [height, width], "counts": counts}
    x, y, w, h = (int(value) for value in rle.bbox(mask))
    step = max(1, math.ceil(max(height, width) / DRAWN_SIDE))
    rings = [simplify(_slanted(ring), STRAY) for ring in outlines(rle.decode(mask)[y : y + h : step, x : x + w : step])]
    return "".join(_rounded(ring * float(step) + (x, y), ROUND * step) for ring in rings)


def _slanted(ring: np.ndarray) -> np.ndarray:
    """The borders of pixels [m, 2] without their stairs: a line through the middles of short sides, and through two
    places of long ones, so that their corners stay."""
    way = np.roll(ring, -1, axis=0) - ring
    length = np.abs(way).sum(1, keepdims=True)  # sides are horizontal or vertical
    near = np.minimum(length / 2, CORNER) / length
    both = np.stack([ring + way * near, ring + way * (1 - near)], 1)  # [m, 2 places, 2]
    single = length[:, 0] <= 2 * CORNER
    keep = np.stack([np.ones_like(single), ~single], 1)
    return both[keep]


def _rounded(ring: np.ndarray, radius: float) -> str:
    """A closed polygon [m, 2] with rounded corners: lines, and a quadratic curve around each corner."""
    before, after = np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0)

    def towards(others: np.ndarray) -> np.ndarray:
        """The point on the way from each corner to another one at which its curve begins or ends."""
        way = others - ring
        length = np.linalg.norm(way, axis=1, keepdims=True)
        return ring + way / np.maximum(length, 1e-9) * np.minimum(length / 2, radius)

    parts = [
        f"{'L' if number else 'M'}{x1:.1f} {y1:.1f}Q{x:.1f} {y:.1f} {x2:.1f} {y2:.1f}"
        for number, ((x1, y1), (x, y), (x2, y2)) in enumerate(zip(towards(before), ring, towards(after), strict=True))
    ]
    return "".join(parts) + "z"
