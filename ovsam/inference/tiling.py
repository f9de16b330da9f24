"""Large pictures in overlapping tiles: where they lie, and how what was found in them becomes one set of instances.

All masks are run lengths, so that memory is that of a tile and of outlines, not of full-size masks.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ovsam.errors import InputError
from ovsam.ops import rle
from ovsam.ops.nms import fast_nms, within
from ovsam.results.instance import Instance
from ovsam.results.results import Results

SAME = 0.5  # least IoU, within what two tiles share, of two views of one thing
INSIDE = 0.8  # least share of a thing's pixels in another of the same word for it to be a part of that one
DUPLICATE = 0.6  # least IoU of two whole things for the lower score to go
EDGE = 2  # px; a mask that comes this close to the edge of its tile is cut by it


class Window(NamedTuple):
    """A part of a picture in pixels; the far edges are exclusive."""

    x1: int
    y1: int
    x2: int
    y2: int


class Piece(NamedTuple):
    """An instance whose mask is in the coordinates of the whole picture, and the window in which it was found."""

    instance: Instance
    window: Window


def tiles(size: tuple[int, int], tile: int, overlap: int) -> list[Window]:
    """Windows of at most `tile` pixels a side that cover a picture of `size` (height, width), row by row.

    Neighbours share `overlap` pixels or more: the windows are spread evenly. What is no larger than the overlap is
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
    """Ask about each tile of a picture, and once about the whole, made as small as a tile, for what is larger than one.

    Args:
        ask: a picture -> what is in it.
        tile, overlap: in pixels. Things up to the size of the overlap are never cut.
        whole: also ask about the whole picture.
        per_word: instances of different words are never the same thing; as in post-processing.

    Returns:
        one set of instances in the picture's coordinates, best first.
    """
    size = image.height, image.width
    windows = tiles(size, tile, overlap)
    if len(windows) == 1:
        return ask(image)
    pieces: list[Piece] = []
    results = None
    for window in windows:
        results = ask(image.crop(window))
        pieces += place(results, window, size)
    overview: list[Instance] = []
    if whole:
        scale = tile / max(size)
        small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        # What fits into the overlap was seen whole, and larger, in a tile.
        overview = [_grow(one, size) for one in ask(small) if max(one.bbox[2:]) > overlap * scale]
    return Results(merge(pieces, overview, per_word), size, results.model, results.file_name)


def place(instances: Sequence[Instance], window: Window, size: tuple[int, int]) -> list[Piece]:
    """Instances of a window, in its coordinates, as pieces of the picture of `size` (height, width)."""
    return [Piece(_move(instance, window.x1, window.y1, size), window) for instance in instances if instance.area]


def merge(pieces: Sequence[Piece], overview: Sequence[Instance] = (), per_word: bool = False) -> list[Instance]:
    """Make one set of instances of what was found in overlapping windows and in the whole picture.

    Two pieces of different windows are one thing if their masks agree in what the windows share: by IoU, or, for the
    same word, because one lies inside the other. Things that chains of pieces connect are joined; name and scores are
    those of the best piece that no seam cuts, or else of the best. An instance of the overview is added where the
    pieces do not show it already, and replaces pieces of it that a seam cuts. Last, duplicates go (Fast NMS).

    Returns:
        the instances, best first, numbered from 1.
    """
    found, cut = _join(pieces, per_word)
    found = _add_overview(found, cut, list(overview), per_word)
    masks = [instance.segmentation for instance in found]
    overlap = torch.from_numpy(rle.iou(masks, masks))
    scores = torch.tensor([instance.score for instance in found], dtype=torch.float64)
    if per_word:
        overlap = within(overlap, torch.from_numpy(_word_ids(found)))
    kept = fast_nms(overlap, scores + 1e-9, DUPLICATE)  # a score may be 0
    order = [i for i in scores.argsort(descending=True, stable=True).tolist() if kept[i] > 0]
    return [replace(found[i], id=number) for number, i in enumerate(order, start=1)]


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    count = max(1, -(-(length - overlap) // (tile - overlap)))
    return np.linspace(0, max(0, length - tile), count).round().astype(int).tolist()


def _join(pieces: Sequence[Piece], per_word: bool) -> tuple[list[Instance], np.ndarray]:
    """Pieces -> whole things, and which of these [n] a seam still cuts."""
    if not pieces:
        return [], np.zeros(0, dtype=bool)
    instances = [piece.instance for piece in pieces]
    height, width = instances[0].segmentation["size"]
    masks = [instance.segmentation for instance in instances]
    windows = list(dict.fromkeys(piece.window for piece in pieces))
    home = np.array([windows.index(piece.window) for piece in pieces])
    areas = np.array([max(1, instance.area) for instance in instances])

    frames = [_rectangle(window, (height, width)) for window in windows]
    seen = (rle.covered(masks, frames) * areas[:, None])[:, home]  # [n, n]; what of the row the column's window shows
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
    group = _connected(joined)
    whole, cut = [], []
    for number in np.unique(group):
        members = np.flatnonzero(group == number)
        best = max(members, key=lambda i: (not limits[i].any(), instances[i].score))
        union = rle.union([masks[i] for i in members]) if len(members) > 1 else masks[best]
        whole.append(_with_mask(instances[best], union))
        cut.append(_is_open(boxes[members], edges[members], limits[members]))
    return whole, np.array(cut)


def _add_overview(found: list[Instance], cut: np.ndarray, overview: list[Instance], per_word: bool) -> list[Instance]:
    """Add what the overview shows and the tiles do not; pieces of it that a seam cuts go."""
    if not overview:
        return found
    small, large = [one.segmentation for one in found], [one.segmentation for one in overview]
    words = _word_ids([*found, *overview])
    alike = words[: len(found), None] == words[len(found) :]  # [n, m]
    told = rle.covered(large, small).T * (alike if per_word else 1)  # [n, m]; what of the large one is in the small one
    # Already known: from one thing, or from several that are whole (a crowd, of which the overview made one).
    known = np.maximum(told.max(0, initial=0), told[~cut].sum(0)) >= INSIDE
    parts = (rle.covered(small, large) >= INSIDE) & alike & cut[:, None] & ~known
    kept = [instance for instance, part in zip(found, parts.any(1), strict=True) if not part]
    return kept + [instance for instance, there in zip(overview, known, strict=True) if not there]


def _connected(joined: np.ndarray) -> np.ndarray:
    """The connected component of each of n nodes, named by its first node; joined [n, n] is symmetric."""
    names = np.arange(len(joined))
    while True:
        smallest = np.where(joined, names, len(names)).min(1, initial=len(names))
        smallest = np.minimum(names, smallest)
        if (smallest == names).all():
            return names
        names = smallest


def _cut(boxes: np.ndarray, edges: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Does its window's left, upper, right or lower edge cut a thing? Of the picture's own edges none does.

    boxes, edges [n, 4] -> [n, 4] bool
    """
    height, width = size
    near = np.concatenate([boxes[:, :2] < edges[:, :2] + EDGE, boxes[:, 2:] > edges[:, 2:] - EDGE], axis=1)
    return near & (edges != [0, 0, width, height])


def _is_open(boxes: np.ndarray, edges: np.ndarray, limits: np.ndarray) -> bool:
    """Is one of the pieces of a thing cut where no other piece's window shows how it goes on? All [m, 4]."""
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
    """An instance of a small picture in the large one of `size` (height, width)."""
    x1, y1, x2, y2 = (int(value) for value in instance.box)
    scale = np.array(size) / instance.segmentation["size"]
    (top, left), (bottom, right) = np.round([y1, x1] * scale).astype(int), np.round([y2, x2] * scale).astype(int)
    part = Image.fromarray(np.uint8(instance.mask[y1:y2, x1:x2]) * 255)
    part = part.resize((right - left, bottom - top), Image.Resampling.BILINEAR)
    return _with_mask(instance, rle.encode(np.asarray(part) > 127, left, top, size))


def _move(instance: Instance, x: int, y: int, size: tuple[int, int]) -> Instance:
    """An instance of a part of a picture, whose upper left pixel is x, y, in the picture of `size`."""
    x1, y1, x2, y2 = (int(value) for value in instance.box)
    return _with_mask(instance, rle.encode(instance.mask[y1:y2, x1:x2], x + x1, y + y1, size))


def _with_mask(instance: Instance, segmentation: rle.RLE) -> Instance:
    return replace(instance, segmentation=segmentation, bbox=rle.bbox(segmentation), area=rle.area(segmentation))
