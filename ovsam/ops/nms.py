"""Non-maximum suppression on any pairwise overlap: for boxes, masks or run lengths.

Arrays are numpy arrays or tensors. Each function of `NMS` takes overlap [n, n] (symmetric, in [0, 1]), scores [n] in
[0, 1] in any order, and a threshold, and returns new scores [n]: 0 for suppressed instances, or lowered scores
(matrix). To suppress only among instances of the same label, pass `within(overlap, labels)`.
"""

from collections.abc import Callable

from ovsam.ops.arrays import Array, count, descending, namespace
from ovsam.ops.boxes import box_iou


def fast_nms(overlap: Array, scores: Array, threshold: float) -> Array:
    """Fast NMS (YOLACT, Bolya et al. 2019, §4.1): remove instances overlapped by any instance of higher score."""
    if not len(scores):
        return scores
    return scores * (namespace(scores).amax(_overlap_with_better(overlap, scores), 0) <= threshold)


def matrix_nms(overlap: Array, scores: Array, threshold: float = 0.0, sigma: float = 0.5) -> Array:
    """Matrix NMS (SOLOv2, Wang et al. 2020): Gaussian soft NMS in one step.

    The decay is smaller if the instance of higher score is itself likely to be suppressed. There is no threshold.
    """
    if not len(scores):
        return scores
    xp, overlap = namespace(scores), _overlap_with_better(overlap, scores)
    doubt = xp.amax(overlap, 0)  # [n]; highest overlap of each instance with one of higher score
    return scores * xp.amin(xp.exp(-(overlap**2 - doubt[:, None] ** 2) / sigma), 0).clip(max=1)


NMS: dict[str, Callable[[Array, Array, float], Array]] = {"fast": fast_nms, "matrix": matrix_nms}


def within(overlap: Array, labels: Array) -> Array:
    """Overlap [n, n] of instances with the same label [n], zero between different labels."""
    return overlap * (labels[:, None] == labels)


def suppress(overlap: Array, threshold: float) -> Array:
    """Fast NMS for instances in order of descending score. overlap [n, n] -> keep [n] bool."""
    xp = namespace(overlap)
    return xp.amax(xp.triu(overlap, 1), 0) <= threshold if len(overlap) else overlap.any(-1)


def fast_box_nms(boxes: Array, threshold: float) -> Array:
    """boxes [n, 4] xyxy in order of descending score -> keep [n] bool."""
    return suppress(box_iou(boxes, boxes), threshold)


def _overlap_with_better(overlap: Array, scores: Array) -> Array:
    """overlap [n, n] where the row has a higher score than the column, zero elsewhere; ties go to the first."""
    order = descending(scores)
    place = namespace(scores).zeros_like(order)
    place[order] = count(scores, 0, len(scores))
    return overlap * (place[:, None] < place)
