"""Metrics of masks over time, on masks and numbers alone.

- J and F (Perazzi et al. 2016, section 4): the IoU of a mask, and the F-measure of its boundary, whose pixels match
  within 0.8 % of the diagonal of the image; J&F is their mean. Averages are over the frames between the prompted one
  and the last, both left out, then over objects, as in DAVIS 2017.
- Identity switches (Bernardin and Stiefelhagen 2008): how often the track that covers an object is another one than the
  last that did.
- The IoU of a track and an object over all frames together, as YouTube-VIS defines it (Yang et al. 2019, section 3).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

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


class TrackOverlap:
    """Overlap of tracks with the true objects of a video, added frame by frame.

    Attributes:
        truths: number of frames that show each object.
    """

    def __init__(self) -> None:
        self.truths: Counter[int] = Counter()
        self._covered: dict[int, Counter[int]] = {}  # object -> track -> frames in which it covers the object
        self._switches: Counter[int] = Counter()
        self._last: dict[int, int] = {}
        self._areas: tuple[Counter[int], Counter[int]] = (Counter(), Counter())  # of tracks, of objects
        self._both: Counter[tuple[int, int]] = Counter()

    def add(
        self,
        tracks: Mapping[int, np.ndarray],
        objects: Mapping[int, np.ndarray],
        allowed: Callable[[int, int], bool] = lambda track, number: True,
    ) -> None:
        """Add a frame. Tracks cover objects with which they overlap by an IoU of 0.5 or more, one to one.

        Args:
            tracks, objects: masks [H, W] bool by id.
            allowed: whether a track may stand for an object, such as only one of its class name.
        """
        there = {number: mask for number, mask in objects.items() if mask.any()}
        overlap = np.zeros((len(there), len(tracks)))
        for row, (number, truth) in enumerate(there.items()):
            self._areas[1][number] += int(truth.sum())
            for column, (track, mask) in enumerate(tracks.items()):
                self._both[track, number] += int((mask & truth).sum())
                overlap[row, column] = region_similarity(mask, truth) if allowed(track, number) else 0.0
        self._areas[0].update({track: int(mask.sum()) for track, mask in tracks.items()})
        rows, columns = linear_sum_assignment(-overlap)
        pairs = zip(rows, columns, strict=True)
        covered = {list(there)[r]: list(tracks)[c] for r, c in pairs if overlap[r, c] >= SAME}
        for number in there:
            self.truths[number] += 1
            if number in covered:
                self._covered.setdefault(number, Counter())[covered[number]] += 1
                self._switches[number] += number in self._last and self._last[number] != covered[number]
                self._last[number] = covered[number]

    def objects(self) -> dict[int, tuple[bool, int]]:
        """Return for each object whether it was found and followed, that is whether one track covers it in half of the
        frames that show it or more, and its identity switches."""
        most = {number: max(self._covered.get(number, {0: 0}).values()) for number in self.truths}
        return {n: (most[n] >= SAME * shown, self._switches[n]) for n, shown in self.truths.items()}

    def covered(self) -> dict[int, float]:
        """Return for each object the share of its frames in which any track covers it."""
        return {n: sum(self._covered.get(n, Counter()).values()) / shown for n, shown in self.truths.items()}

    def iou(self, tracks: Sequence[int], objects: Sequence[int]) -> np.ndarray:
        """Return the IoU of tracks and objects over all frames together, [tracks, objects]."""
        both = np.array([[self._both[track, number] for number in objects] for track in tracks], dtype=float)
        both = both.reshape(len(tracks), len(objects))
        first, second = ([area[i] for i in ids] for area, ids in zip(self._areas, (tracks, objects), strict=True))
        return both / np.maximum(np.array(first)[:, None] + np.array(second)[None] - both, 1.0)
