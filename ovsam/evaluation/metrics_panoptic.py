"""Metrics of maps with one segment or one class at every pixel: panoptic quality and mean IoU."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

VOID = 0  # the segment id of pixels that are not annotated, or not predicted


@dataclass
class Panoptic:
    """ids [H, W]: segment of each pixel, VOID for none; class_of: class of each segment; crowd: segments that stand for
    several objects."""

    ids: np.ndarray
    class_of: Mapping[int, int]
    crowd: frozenset[int] = frozenset()


@dataclass
class _Count:
    iou: float = 0.0
    right: int = 0
    false: int = 0
    missed: int = 0


def panoptic_quality(pairs: Iterable[tuple[Panoptic, Panoptic]]) -> dict[str, float]:
    """PQ, SQ and RQ over (prediction, truth) of each image, averaged over classes (Kirillov et al. 2019, §4).

    A predicted segment matches a true one of its class above an IoU of one half, where the union excludes void pixels
    of the ground truth; an unmatched one that lies mostly in void or in a crowd of its class is ignored.

    Raises:
        ValueError: a segment of a map is missing in its `class_of`.
    """
    counts: dict[int, _Count] = defaultdict(_Count)
    for predicted, truth in pairs:
        _count_image(predicted, truth, counts)
    shown = [one for one in counts.values() if one.right + one.false + one.missed]
    if not shown:
        return dict.fromkeys(("PQ", "SQ", "RQ"), float("nan"))
    weights = [one.right + one.false / 2 + one.missed / 2 for one in shown]
    return {
        "PQ": float(np.mean([one.iou / weight for one, weight in zip(shown, weights, strict=True)])),
        "SQ": float(np.mean([one.iou / one.right if one.right else 0.0 for one in shown])),
        "RQ": float(np.mean([one.right / weight for one, weight in zip(shown, weights, strict=True)])),
    }


def _count_image(predicted: Panoptic, truth: Panoptic, counts: dict[int, _Count]) -> None:
    both, shared = np.unique(np.stack([truth.ids.ravel(), predicted.ids.ravel()]), axis=1, return_counts=True)
    overlap = {(int(t), int(p)): int(n) for t, p, n in zip(*both, shared, strict=True)}
    true_area, area = (
        {int(i): int(n) for i, n in zip(*np.unique(one.ids, return_counts=True), strict=True) if i != VOID}
        for one in (truth, predicted)
    )
    for one, areas in ((truth, true_area), (predicted, area)):
        if missing := areas.keys() - one.class_of.keys():
            raise ValueError(f"Segment {min(missing)} of a map is missing in its class_of.")
    matched, found = set(), set()
    for (t, p), common in overlap.items():
        if VOID in (t, p) or t in truth.crowd or truth.class_of[t] != predicted.class_of[p]:
            continue
        iou = common / (area[p] + true_area[t] - common - overlap.get((VOID, p), 0))
        if iou > 0.5:
            count = counts[truth.class_of[t]]
            count.right, count.iou = count.right + 1, count.iou + iou
            matched.add(t)
            found.add(p)
    for t in true_area.keys() - matched - truth.crowd:
        counts[truth.class_of[t]].missed += 1
    for p in area.keys() - found:
        crowds = [t for t in truth.crowd if truth.class_of[t] == predicted.class_of[p]]
        passed = overlap.get((VOID, p), 0) + sum(overlap.get((t, p), 0) for t in crowds)
        if passed / area[p] <= 0.5:
            counts[predicted.class_of[p]].false += 1


def mean_iou(pairs: Iterable[tuple[np.ndarray, np.ndarray]], classes: int, ignored: int = 255) -> float:
    """Mean over classes of the IoU over all pixels, of (prediction, truth) [H, W] in 0..classes-1; true pixels with
    `ignored` are left out, and so are classes without pixels in either."""
    table = np.zeros((classes, classes + 1), np.int64)  # true class, predicted class or none
    for predicted, truth in pairs:
        valid = truth != ignored
        guess = predicted[valid].astype(np.int64)
        guess = np.where((guess >= 0) & (guess < classes), guess, classes)
        cells = truth[valid].astype(np.int64) * (classes + 1) + guess
        table += np.bincount(cells, minlength=table.size).reshape(table.shape)
    shared = np.diag(table)
    union = table.sum(1) + table[:, :classes].sum(0) - shared
    return float(np.mean(shared[union > 0] / union[union > 0]))
