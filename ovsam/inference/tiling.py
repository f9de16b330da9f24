"""Segmentation of large images in overlapping tiles: positions of the tiles, and merging of per-tile instances.

All masks are run lengths, so that memory is that of a tile and of outlines, not of full-size masks.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ovsam.errors import InputError
from ovsam.ops import rle
from ovsam.ops.arrays import descending
from ovsam.ops.components import connected_nodes
from ovsam.ops.nms import fast_nms, within
from ovsam.processing.images import MIN_SIDE
from ovsam.results.instance import Instance
from ovsam.results.results import Results

SAME = 0.5  # minimum IoU, within the overlap of two tiles, of two masks of one object
INSIDE = 0.8  # minimum share of a mask inside another one of the same class for it to be a part of it
DUPLICATE = 0.6  # minimum IoU of two whole objects at which the lower score is dropped
QUICK = 8  # tiles; more have a bar on a terminal
MAX_TILES = 2_000  # of one image
EDGE = 2  # px; a mask that comes this close to the edge of its tile is cut by it


class Window(NamedTuple):
    """A part of an image in pixels; the far edges are exclusive."""

    x1: int
    y1: int
    x2: int
    y2: int


class TilePiece(NamedTuple):
    """An instance whose mask is in the coordinates of the whole image, and the window in which it was found."""

    instance: Instance
    window: Window


def tiles(size: tuple[int, int], tile: int, overlap: int) -> list[Window]:
    """Windows of at most `tile` pixels a side that cover an image of `size` (height, width), row by row.

    Neighbours share `overlap` pixels or more: the windows are spread evenly. Objects no larger than the overlap lie
    whole in one of them.

    Raises:
        InputError: an overlap that is negative, or not smaller than the tile.
    """
    if not 0 <= overlap < tile:
        raise InputError(
            f"The overlap of tiles is {overlap} px; it must be less than the tile, {tile} px, and not < 0."
        )
    rows, columns = (_starts(length, tile, overlap) for length in size)
    height, width = size
    return [Window(x, y, min(x + tile, width), min(y + tile, height)) for y in rows for x in columns]


def segment_tiled(
    ask: Callable[[Image.Image], Results],
    image: Image.Image,
    tile: int = 1024,
    overlap: int = 256,
    whole: bool = True,
    per_word: bool = False,
) -> Results:
    """Segment each tile of an image, and the whole image reduced to the size of a tile for objects larger than one.

    Args:
        ask: an image -> its instances.
        tile, overlap: in pixels. Objects up to the size of the overlap are never cut.
        whole: also segment the whole image.
        per_word: instances of different class names are never merged; as in post-processing.

    Returns:
        one set of instances in the coordinates of the image, highest score first.
    """
    size = image.height, image.width
    windows = tiles(size, tile, overlap)
    if len(windows) == 1:
        return ask(image)
    if len(windows) > MAX_TILES:
        raise InputError(f"Tiles of {tile} pixels would be {len(windows):,}; take larger ones, {MAX_TILES:,} at most.")
    pieces: list[TilePiece] = []
    results = None
    for window in tqdm(windows, unit=" tiles", disable=len(windows) < QUICK or None):  # None: no terminal, no bar
        results = ask(image.crop(window))
        pieces += place(results, window, size)
    overview: list[Instance] = []
    if whole:
        scale = tile / max(size)
        # A very narrow image stays wide enough to be segmented.
        small = image.resize([max(MIN_SIDE, round(side * scale)) for side in image.size])
        # Objects that fit into the overlap are whole, and larger, in a tile.
        overview = [_grow(one, size) for one in ask(small) if max(one.bbox[2:]) > overlap * scale]
    return Results(merge(pieces, overview, per_word), size, results.model, results.file_name)


def place(instances: Sequence[Instance], window: Window, size: tuple[int, int]) -> list[TilePiece]:
    """Instances of a window, in its coordinates, as pieces of the image of `size` (height, width)."""
    return [TilePiece(_move(instance, window.x1, window.y1, size), window) for instance in instances if instance.area]


def merge(pieces: Sequence[TilePiece], overview: Sequence[Instance] = (), per_word: bool = False) -> list[Instance]:
    """Merge the instances of overlapping windows and of the whole image.

    Two pieces of different windows are one object if their masks agree in what the windows share: by IoU, or, for the
    same word, because one lies inside the other. Objects connected by chains of pieces are joined; name and scores are
    those of the best piece that no seam cuts, or else of the best. An instance of the overview is added where the
    pieces do not show it already, and replaces pieces of it that a seam cuts. Last, duplicates go (Fast NMS).

    Returns:
        the instances, highest score first, numbered from 1.
    """
    found, cut = _join(pieces, per_word)
    found = _add_overview(found, cut, list(overview), per_word)
    masks = [instance.segmentation for instance in found]
    overlap = rle.iou(masks, masks)
    scores = np.array([instance.score for instance in found], dtype=np.float64)
    if per_word:
        overlap = within(overlap, _word_ids(found))
    kept = fast_nms(overlap, scores + 1e-9, DUPLICATE)  # a score may be 0
    order = [i for i in descending(scores).tolist() if kept[i] > 0]
    return [replace(found[i], id=number) for number, i in enumerate(order, start=1)]


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    count = max(1, -(-(length - overlap) // (tile - overlap)))
    return np.linspace(0, max(0, length - tile), count).round().astype(int).tolist()


def _join(pieces: Sequence[TilePiece], per_word: bool) -> tuple[list[Instance], np.ndarray]:
    """Pieces -> whole objects, and whether a seam still cuts each [n]."""
    if not pieces:
        return [], np.zeros(0, dtype=bool)
    instances = [piece.instance for piece in pieces]
    height, width = instances[0].segmentation["size"]
    masks = [instance.segmentation for instance in instances]
    windows = list(dict.fromkeys(piece.window for piece in pieces))
    home = np.array([windows.index(piece.window) for piece in pieces])
    areas = np.array([max(1, instance.area) for instance in instances])

    frames = [_rectangle(window, (height, width)) for window in windows]
    seen = (rle.covered(masks, frames) * areas[:, None])[:, home]  # [n, n]; area of the row inside the column's window
    shared = rle.covered(masks, masks) * areas[:, None]
    same = shared >= SAME * (seen + seen.T - shared)
    words = _word_ids(instances)
    alike = words[:, None] == words
    inside = alike & (shared >= INSIDE * np.minimum(seen, seen.T))
    joined = (same & alike if per_word else same) | inside
    joined &= (shared > 0) & (home[:, None] != home)

    edges = np.array([piece.window for piece in pieces])  # [n, 4]
    boxes = np.array([instance.box for instance in instances], dtype=int)
    limits = _cut(boxes, edges, (height, width))  # [n, 4]
    group = connected_nodes(joined)
    whole, cut = [], []
    for number in np.unique(group):
        members = np.flatnonzero(group == number)
        best = max(members, key=lambda i: (not limits[i].any(), instances[i].score))
        union = rle.union([masks[i] for i in members]) if len(members) > 1 else masks[best]
        whole.append(_with_mask(instances[best], union))
        cut.append(_is_open(boxes[members], edges[members], limits[members]))
    return whole, np.array(cut)


def _add_overview(found: list[Instance], cut: np.ndarray, overview: list[Instance], per_word: bool) -> list[Instance]:
    """Add the instances that only the overview has, and remove pieces of them that a seam cuts."""
    if not overview:
        return found
    small, large = [one.segmentation for one in found], [one.segmentation for one in overview]
    words = _word_ids([*found, *overview])
    alike = words[: len(found), None] == words[len(found) :]  # [n, m]
    # [n, m]; fraction of the large mask covered by the small one
    covered = rle.covered(large, small).T * (alike if per_word else 1)
    # Covered by one object, or by several whole ones (a crowd that the overview merges).
    found_before = np.maximum(covered.max(0, initial=0), covered[~cut].sum(0)) >= INSIDE
    parts = (rle.covered(small, large) >= INSIDE) & alike & cut[:, None] & ~found_before
    kept = [instance for instance, part in zip(found, parts.any(1), strict=True) if not part]
    return kept + [instance for instance, there in zip(overview, found_before, strict=True) if not there]


def _cut(boxes: np.ndarray, edges: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Whether the left, upper, right or lower edge of its window cuts each object; edges of the image do not.

    boxes, edges [n, 4] -> [n, 4] bool
    """
    height, width = size
    near = np.concatenate([boxes[:, :2] < edges[:, :2] + EDGE, boxes[:, 2:] > edges[:, 2:] - EDGE], axis=1)
    return near & (edges != [0, 0, width, height])


def _is_open(boxes: np.ndarray, edges: np.ndarray, limits: np.ndarray) -> bool:
    """Whether a piece of an object is cut where no other window covers the pixels beyond. All [m, 4]."""
    for piece, side in np.argwhere(limits):
        across, along = side % 2, 1 - side % 2
        beyond = edges[piece, side] - (side < 2)  # the first line of pixels behind the edge
        low, high = boxes[piece, along], boxes[piece, along + 2]
        shown = np.zeros(high - low, dtype=bool)
        for window in edges[(edges[:, across] <= beyond) & (beyond < edges[:, across + 2])]:
            shown[max(0, window[along] - low) : max(0, window[along + 2] - low)] = True
        if not shown.all():
            return True
    return False


def _word_ids(instances: Sequence[Instance]) -> np.ndarray:
    number = {label: i for i, label in enumerate(dict.fromkeys(instance.label for instance in instances))}
    return np.array([number[instance.label] for instance in instances], dtype=int)


def _rectangle(window: Window, size: tuple[int, int]) -> rle.RLE:
    x1, y1, x2, y2 = window
    return rle.encode(np.ones((y2 - y1, x2 - x1), dtype=bool), x1, y1, size)


def _grow(instance: Instance, size: tuple[int, int]) -> Instance:
    """An instance of the reduced image in the full one of `size` (height, width)."""
    x1, y1, x2, y2 = (int(value) for value in instance.box)
    scale = np.array(size) / instance.segmentation["size"]
    (top, left), (bottom, right) = np.round([y1, x1] * scale).astype(int), np.round([y2, x2] * scale).astype(int)
    part = Image.fromarray(np.uint8(instance.mask[y1:y2, x1:x2]) * 255)
    part = part.resize((right - left, bottom - top), Image.Resampling.BILINEAR)
    return _with_mask(instance, rle.encode(np.asarray(part) > 127, left, top, size))


def _move(instance: Instance, x: int, y: int, size: tuple[int, int]) -> Instance:
    """An instance of a part of an image, whose upper left pixel is x, y, in the image of `size`."""
    x1, y1, x2, y2 = (int(value) for value in instance.box)
    return _with_mask(instance, rle.encode(instance.mask[y1:y2, x1:x2], x + x1, y + y1, size))


def _with_mask(instance: Instance, segmentation: rle.RLE) -> Instance:
    return replace(instance, segmentation=segmentation, bbox=rle.bbox(segmentation), area=rle.area(segmentation))
