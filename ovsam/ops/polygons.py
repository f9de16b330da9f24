"""Masks as polygons along the edges of their pixels, and polygons as masks."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ovsam.ops import outlines as annotated
from ovsam.ops.rle import RLE


def to_polygon(mask: np.ndarray, tolerance: float = 0.0) -> np.ndarray:
    """Return one polygon [m, 2] of x, y in pixels for a mask [H, W], along the edges of its pixels; [0, 2] if empty.

    Further parts and holes are connected to it by bridges without width, so that filling it gives the same mask, by
    either fill rule. `tolerance` removes corners that deviate by at most that many pixels (Douglas and Peucker 1973).
    """
    rings = simplified_outlines(mask, tolerance)
    if not rings:
        return np.zeros((0, 2))
    polygon = rings[0]
    for ring in rings[1:]:
        apart = np.abs(polygon[:, None] - ring).sum(-1)  # [m, k]
        here, there = np.unravel_index(apart.argmin(), apart.shape)
        ring = np.roll(ring, -there, axis=0)
        polygon = np.concatenate([polygon[: here + 1], ring, ring[:1], polygon[here:]])
    return polygon.astype(float)


def simplified_outlines(mask: np.ndarray, tolerance: float) -> list[np.ndarray]:
    """`outlines` without the corners that stray no further than `tolerance` pixels."""
    return [simplify(ring, tolerance) if tolerance else ring for ring in outlines(mask)]


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Return the borders of a mask [H, W] along the edges of its pixels: closed polygons [m, 2] of x, y, exact.

    Outer borders run clockwise on the screen and holes the other way, so that both fill rules agree. Pixels that touch
    only at a corner are separate parts.
    """
    grid = np.pad(mask.astype(bool), 1)
    quads = np.stack([grid[:-1, :-1], grid[:-1, 1:], grid[1:, :-1], grid[1:, 1:]])  # around each corner: ul, ur, ll, lr
    diagonal = (quads[0] == quads[3]) & (quads[1] == quads[2]) & (quads[0] != quads[1])
    corner = (quads.sum(0) % 2 == 1) | diagonal
    y, x = np.nonzero(corner)
    # A corner where two pixels touch counts as two corners, a left and a right one.
    place = np.arange(len(x)).repeat(diagonal[y, x].astype(int) + 1)
    right = np.diff(place, prepend=-1) == 0
    x, y = x[place], y[place]
    falling = quads[0][y, x]  # the pixels that touch are upper left and lower right
    # Sides connect consecutive corners of a row, and of a column, in pairs.
    lower = np.where(falling, right, ~right)
    across, down = _pair(np.lexsort([right, x, y])), _pair(np.lexsort([lower, y, x]))
    polygons, seen = [], [False] * len(x)
    for start in range(len(x)):  # np.nonzero goes row by row: the first of a ring is its upper left corner
        ring, at = [], start
        while not seen[at]:
            ring += [at, across[at]]
            seen[at] = seen[across[at]] = True
            at = down[across[at]]
        if not ring:
            continue
        polygon = np.stack([x[ring], y[ring]], 1)
        polygons.append(polygon if grid[y[start] + 1, x[start] + 1] else polygon[::-1])
    return polygons


def _pair(order: np.ndarray) -> list[int]:
    """Return the partner of each element when consecutive elements of this order form pairs."""
    partner = np.empty(len(order), int)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    return partner.tolist()


def simplify(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """Remove the corners of a closed polygon [m, 2] that are at most `tolerance` from the line between their
    neighbours; at least three are kept."""
    far = int(np.abs(ring - ring[0]).sum(1).argmax())
    closed = np.concatenate([ring, ring[:1]])
    keep, spans = {0, far}, [(0, far), (far, len(ring))]
    while spans:
        first, last = spans.pop()
        if last - first < 2:
            continue
        (dx, dy), (ax, ay) = closed[last] - closed[first], (closed[first + 1 : last] - closed[first]).T
        length = np.hypot(dx, dy)
        away = np.abs(dx * ay - dy * ax) / length if length else np.hypot(ax, ay)
        if away.max() > tolerance or len(keep) < 3:
            middle = first + 1 + int(away.argmax())
            keep.add(middle)
            spans += [(first, middle), (middle, last)]
    return ring[sorted(keep)]


def parts(mask: np.ndarray, tolerance: float = 0.0) -> list[list[np.ndarray]]:
    """Return the connected parts of a mask [H, W]: each is its outer border followed by its holes, polygons [m, 2].

    Outer borders run clockwise on the screen and holes the other way, as in `outlines`.
    """
    rings = outlines(mask)
    outer = [ring for ring in rings if _signed_area(ring) > 0]
    found = [[ring] for ring in outer]
    for hole in rings:
        if _signed_area(hole) > 0:
            continue
        # The pixel above the upper left corner of a hole belongs to the part around it.
        y, x = hole[np.lexsort([hole[:, 0], hole[:, 1]])[0]][::-1] + np.array([-0.5, 0.5])
        around = [i for i, ring in enumerate(outer) if _inside(ring, x, y)]
        found[min(around, key=lambda i: _signed_area(outer[i]))].append(hole)
    return [[simplify(ring, tolerance) if tolerance else ring for ring in part] for part in found]


def fill(polygons: Sequence[Any], height: int, width: int) -> RLE:
    """Fill polygons, each [m, 2] of x, y in pixels, into one mask by the rule of pycocotools, which inverts
    `to_polygon`.

    Raises InputError for invalid polygons and for those that exceed the image by more than two pixels; the message
    lacks its subject, as in `ovsam.ops.outlines`.
    """
    flat = [np.asarray(polygon, dtype=np.float64).ravel().tolist() for polygon in polygons]
    found = annotated.to_rle(flat, height, width)
    return {"size": [height, width], "counts": found["counts"].decode("ascii")}


def _signed_area(ring: np.ndarray) -> float:
    """Signed area of a ring, positive if it runs clockwise on the screen."""
    x, y = ring.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def _inside(ring: np.ndarray, x: float, y: float) -> bool:
    """Whether a ring of horizontal and vertical sides surrounds a point, by counting its sides on the right."""
    after = np.roll(ring, -1, axis=0)
    crosses = ((ring[:, 1] <= y) != (after[:, 1] <= y)) & (ring[:, 0] > x)
    return bool(crosses.sum() % 2)
