"""Metrics, by their published definitions: from numbers and masks, without models or files.

- IoU: per instance, averaged over instances (IoU_b and IoU_n of Open-Vocabulary SAM, Yuan et al. 2024, §4).
- Boundary IoU (Cheng et al. 2021, §4): the IoU of two boundaries; the boundary of a mask is the part of it within 2 %
  of the diagonal of the image from its outside, and the border of the image counts as outside.
- Iterated clicks (SAM, RITM): the first click is the pixel of the object farthest from its boundary, each next one that
  of the larger error region, positive where the mask misses the object and negative where it covers too much.
- cgF1, pmF1 and IL_MCC (SAM 3, Carion et al. 2025, §4): of the instances above the score threshold, one query of one
  image at a time; see `concept_f1`.
- Calibration error: the expected one, in 15 bins of equal width (Guo et al. 2017, eq. 3).
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ovsam.ops import rle
from ovsam.ops.masks import deepest_point

NO_CLICK = (0, 0, -10)  # x, y and the label of padding, if there are no errors left
BINS = 15
BOUNDARY = 0.02  # width of the boundary, as a fraction of the diagonal


def rank(logits: Tensor, target: Tensor) -> Tensor:
    """logits [n, K], target [n] -> number of class names with a higher score than the right one, [n]."""
    return (logits > logits.gather(1, target[:, None])).sum(1)


def next_click(mask: np.ndarray, truth: np.ndarray) -> tuple[int, int, int]:
    """Return x, y and label (1 on it, 0 beside it) of the click that corrects a mask [H, W] bool: the pixel farthest
    from the boundary of its false negatives or false positives, whichever distance is larger."""
    missed, beside = truth & ~mask, mask & ~truth
    region = missed if missed.sum() >= beside.sum() else beside
    return (*deepest_point(region), int(region is missed)) if region.any() else NO_CLICK


def boundary_iou(mask: np.ndarray, other: np.ndarray, share: float = BOUNDARY) -> float:
    """Boundary IoU of two masks [H, W] bool, of which at least one is not empty."""
    width = _boundary_width(mask.shape, share)
    either = mask | other
    rows, columns = np.flatnonzero(either.any(1)), np.flatnonzero(either.any(0))
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)  # the border counts as outside
    one, two = (part & ~erode(part, width) for part in (mask[window], other[window]))
    return float((one & two).sum() / (one | two).sum())


def boundary(mask: np.ndarray, share: float = BOUNDARY) -> np.ndarray:
    """The pixels of a mask [H, W] bool that are at most `share` of the image's diagonal from its outside."""
    return mask & ~erode(mask, _boundary_width(mask.shape, share))


def _boundary_width(size: tuple[int, ...], share: float) -> int:
    return max(1, round(share * math.hypot(*size)))


def erode(mask: np.ndarray, distance: int) -> np.ndarray:
    """Return the pixels of a mask [H, W] bool whose neighbours up to `distance` away, also diagonally, are all in the
    mask; pixels beyond the border are not."""
    for axis in (0, 1):
        padding = [(0, 0), (0, 0)]
        padding[axis] = (distance + 1, distance)
        total = np.moveaxis(np.pad(mask, padding).cumsum(axis), axis, 0)
        mask = np.moveaxis(total[2 * distance + 1 :] - total[: -2 * distance - 1] == 2 * distance + 1, 0, axis)
    return mask


def calibration_error(scores: Sequence[float], right: Sequence[bool], bins: int = BINS) -> float:
    """Expected calibration error of scores in [0, 1] (Guo et al. 2017, eq. 3): |mean score - accuracy| of each bin,
    averaged with the number of its scores as weight."""
    score, share, count = reliability(scores, right, bins)
    return float((np.abs(score - share) * count).sum() / count.sum())


def reliability(
    scores: Sequence[float], right: Sequence[bool], bins: int = BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean score, accuracy and count of each non-empty bin of equal width."""
    score, hit = np.asarray(scores, float), np.asarray(right, float)
    place = np.clip(np.ceil(score * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    held = count > 0
    return (
        np.bincount(place, score, bins)[held] / count[held],
        np.bincount(place, hit, bins)[held] / count[held],
        count[held],
    )


def concept_f1(queries: Iterable[np.ndarray]) -> dict[str, float]:
    """cgF1, pmF1 and IL_MCC of overlaps [instances, objects], one array for each query (an image and a phrase), with
    the instances whose score is at least the threshold.

    Instances are matched to objects with the highest sum of IoUs. pmF1: precision and recall summed over the queries
    that have objects, without the false positives of queries without objects; averaged over IoU thresholds 0.50 to
    0.95. IL_MCC: Matthews' correlation of `there is an object` and `there is an instance`. cgF1 is their product; it is
    a share here, not per cent.
    """
    hits, false, missed = np.zeros(10), np.zeros(10), np.zeros(10)
    counts = np.zeros((2, 2))  # [is there an object, is there an instance]
    for overlap in queries:
        found, there = overlap.shape
        counts[int(there > 0), int(found > 0)] += 1
        if not there:
            continue
        pairs = overlap[linear_sum_assignment(-overlap)]
        right = (pairs[None] >= np.linspace(0.5, 0.95, 10)[:, None]).sum(1)
        hits, false, missed = hits + right, false + found - right, missed + there - right
    with np.errstate(invalid="ignore"):
        f1 = float(np.mean(np.nan_to_num(2 * hits / (2 * hits + false + missed))))
    (true_no, false_yes), (false_no, true_yes) = counts.tolist()
    product = (true_yes + false_yes) * (true_yes + false_no) * (true_no + false_yes) * (true_no + false_no)
    correlation = (true_yes * true_no - false_yes * false_no) / math.sqrt(product) if product else 0.0
    return {"cgF1": f1 * correlation, "pmF1": f1, "IL_MCC": correlation}


def are_right(codes: list, labels: list[str], truth: list, named: list[str]) -> list[bool]:
    """Return which instances, highest score first, are right: each is matched to the object of its class name with the
    highest IoU, if it is above one half and the object is not matched yet. Masks are COCO run lengths; `named` are the
    class names of the objects."""
    if not codes or not truth:
        return [False] * len(codes)
    overlap = rle.iou(codes, truth)  # [instances, objects]
    overlap *= np.array(labels)[:, None] == np.array(named)[None]
    right = []
    for row in overlap:
        best = int(row.argmax())
        right.append(bool(row[best] > 0.5))
        if right[-1]:
            overlap[:, best] = 0
    return right
