"""Metrics of masks over time, on masks and numbers alone.

- J and F (Perazzi et al. 2016, section 4): the IoU of a mask, and the F-measure of its boundary, whose pixels match
  within 0.8 % of the diagonal of the image; J&F is their mean. Averages are over the frames between the prompted one
  and the last, both left out, then over objects, as in DAVIS 2017.
- Identity switches (Bernardin and Stiefelhagen 2008): how often the track that covers an object is another one than the
  last that did.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy.ndimage import distance_transform_edt
from scipy.optimize import linear_sum_assignment

TOLERANCE = 0.008  # of the diagonal
SAME = 0.5  # IoU from which on a track covers an object


def region_similarity(mask: np.ndarray, truth: np.ndarray) -> float:
    """J: the IoU of two masks [H, W] bool; 1 where both are empty."""
    either = int((mask | truth).sum())
    return int((mask & truth).sum()) / either if either else 1.0


def boundary_accuracy(mask: np.ndarray, truth: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """F: the F-measure of the boundary of a mask [H, W] bool against that of the truth."""
    one, other = _boundary(mask), _boundary(truth)
    if not one.any() or not other.any():
        return float(one.any() == other.any())
    distance = math.ceil(tolerance * math.hypot(*mask.shape))
    precision = (distance_transform_edt(~other)[one] <= distance).mean()
    recall = (distance_transform_edt(~one)[other] <= distance).mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from the one to the right, below, or both (Martin et al. 2004, as DAVIS uses it)."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])


def j_and_f(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """Mean J and mean F of one object: pairs of mask and truth, a frame each."""
    each = [(region_similarity(mask, truth), boundary_accuracy(mask, truth)) for mask, truth in pairs]
    return (float(np.mean([j for j, _ in each])), float(np.mean([f for _, f in each]))) if each else (1.0, 1.0)


def identity_switches(
    frames: Sequence[tuple[Mapping[int, np.ndarray], Mapping[int, np.ndarray]]],
) -> tuple[dict[int, int], dict[int, float]]:
    """How often each true object changes its track, and the share of its frames in which a track covers it.

    Args:
        frames: for each frame the tracks and the true objects, masks [H, W] bool by id. Those that overlap by an IoU of
            0.5 or more are matched one to one.
    """
    last: dict[int, int] = {}
    switches: dict[int, int] = {}
    shown: dict[int, list[bool]] = {}
    for tracks, objects in frames:
        there = {number: mask for number, mask in objects.items() if mask.any()}
        overlap = np.array([[region_similarity(t, o) for t in tracks.values()] for o in there.values()])
        overlap = overlap.reshape(len(there), len(tracks))
        rows, columns = linear_sum_assignment(-overlap)
        pairs = zip(rows, columns, strict=True)
        covered = {list(there)[r]: list(tracks)[c] for r, c in pairs if overlap[r, c] >= SAME}
        for number in there:
            switches.setdefault(number, 0)
            shown.setdefault(number, []).append(number in covered)
            if number in covered:
                switches[number] += number in last and last[number] != covered[number]
                last[number] = covered[number]
    return switches, {number: float(np.mean(times)) for number, times in shown.items()}
