"""Outlines in the forms of annotation files: polygons, run lengths plain (counts a list) or compressed (counts a
string).

All are converted to the run lengths of pycocotools, {"size": [H, W], "counts": bytes}.
"""

from typing import Any, TypedDict

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from ovsam.errors import InputError
from ovsam.ops.rle import PIXELS

Rle = dict[str, Any]


class RunLengths(TypedDict, total=False):
    """Run lengths of a file, not yet checked."""

    size: list[int]
    counts: Any


Segmentation = list[list[float] | float] | RunLengths  # of a file, not yet checked (see ovsam.ops.schema)
LONGEST = 20_000_000  # px; pycocotools takes 40 bytes for each pixel of a polygon's length, and crashes without memory
SLACK = 2.0  # px by which a polygon may exceed the image, from rounding by annotation tools; it is clipped


def is_outline(segmentation: Any) -> bool:
    """Whether there is an outline; boxes and lines have none."""
    return bool(polygons(segmentation) if isinstance(segmentation, list) else segmentation)


def check_outline(segmentation: Any, height: int, width: int) -> None:
    """Raise InputError unless this is an outline inside an image of this size; the message lacks its subject."""
    if height * width >= PIXELS:
        raise InputError(f"lies in an image of {width}x{height} pixels; masks need an image of under 2^32 pixels")
    if isinstance(segmentation, list):
        if not polygons(segmentation):
            raise InputError("has no polygon of three points or more")
        for polygon in polygons(segmentation):
            _check_polygon(polygon, height, width)
    elif isinstance(segmentation, dict) and {"size", "counts"} <= segmentation.keys():
        if list(segmentation["size"]) != [height, width]:
            raise InputError(f"has a mask of size {segmentation['size']}; it must be {[height, width]} (height, width)")
        lengths = _lengths(segmentation["counts"])
        if lengths.sum() != height * width:
            raise InputError(f"has run lengths that do not add up to the {height * width} pixels of its image")
    else:
        raise InputError("has a segmentation that is neither polygons nor run lengths (size and counts)")


def to_rle(segmentation: Any, height: int, width: int) -> Rle:
    """Raises InputError like `check_outline`; pycocotools itself hangs or crashes on invalid run lengths."""
    check_outline(segmentation, height, width)
    if isinstance(segmentation, list):
        points = [[float(value) for value in polygon] for polygon in polygons(segmentation)]
        return coco.merge(coco.frPyObjects(points, height, width))
    counts = segmentation["counts"]
    if isinstance(counts, list):
        return coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}


def _check_polygon(polygon: Any, height: int, width: int) -> None:
    try:
        points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)  # [x, y, x, y, ...] -> [n, 2]
    except (TypeError, ValueError) as error:
        raise InputError("has a polygon that is not a list of numbers x, y, x, y, ...") from error
    if not points.size:
        raise InputError("has a polygon without points")
    low, high = points.min(0), points.max(0)
    if not (low >= -SLACK).all() or not (high <= np.array([width, height]) + SLACK).all():  # nor is NaN inside
        reach = f"x {low[0]:g} to {high[0]:g} and y {low[1]:g} to {high[1]:g}"
        raise InputError(f"lies outside its image: it has {reach}, the image is {width}x{height} pixels")
    if np.abs(np.diff(points, axis=0)).max(1).sum() > LONGEST:
        raise InputError(f"has a polygon that is longer than {LONGEST:,} pixels")


def from_mask(mask: np.ndarray) -> Rle:
    """mask [H, W] bool -> run lengths."""
    return coco.encode(np.asfortranarray(mask, dtype=np.uint8))


def turn(rle: Rle, orientation: int) -> Rle:
    """Rotate an outline over the stored pixels as the EXIF orientation rotates the image."""
    return from_mask(np.asarray(Image.fromarray(coco.decode(rle)).transpose(UPRIGHT[orientation])))


def polygons(segmentation: list) -> list[Any]:
    """Polygons of three points or more; some tools write a single one without the list around it."""
    found = [segmentation] if segmentation and isinstance(segmentation[0], int | float) else segmentation
    return [polygon for polygon in found if not isinstance(polygon, list) or len(polygon) >= 6]


def _lengths(counts: Any) -> np.ndarray:
    """The lengths of the runs; raises InputError unless all are counts of pixels."""
    if isinstance(counts, str | bytes):
        lengths = _run_lengths(counts)
    elif isinstance(counts, list) and all(type(one) is int and 0 <= one < 1 << 35 for one in counts):
        lengths = np.asarray(counts, dtype=np.int64)
    else:
        raise InputError("has run lengths that are not in COCO's format")
    if len(lengths) and lengths.min() < 0:
        raise InputError("has run lengths below 0, which do not add up to its image")
    return lengths


def _run_lengths(counts: str | bytes) -> np.ndarray:
    """COCO's compressed counts. A number is written in groups of 5 bits, the lowest first, each a character from 48 on;
    bit 32 means that more groups follow, bit 16 of the last is the sign. From the fourth number on, the difference to
    the number two before it is written."""
    text = np.frombuffer(counts.encode("utf-8", "replace") if isinstance(counts, str) else counts, dtype=np.uint8)
    groups = text.astype(np.int64) - 48
    ends = np.flatnonzero((groups & 32) == 0)
    if not len(groups) or groups.min() < 0 or groups.max() > 63 or not len(ends) or ends[-1] != len(groups) - 1:
        raise InputError("has run lengths that are not in COCO's format")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits: no image is that large
        raise InputError("has run lengths that are not in COCO's format")
    shift = 5 * (np.arange(len(groups)) - np.repeat(starts, lengths))
    values = np.add.reduceat((groups & 31) << shift, starts)
    values -= np.where(groups[ends] & 16, 1 << (5 * lengths), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


UPRIGHT = {  # the inverse of each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
