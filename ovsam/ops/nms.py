"""Non-maximum suppression on any pairwise overlap: for boxes, masks or run lengths.

Each function of `NMS` takes overlap [n, n] (symmetric, in [0, 1]), scores [n] in [0, 1] in any order, and a threshold,
and returns new scores [n]: 0 for suppressed instances, or lowered scores (matrix). To suppress only among
instances of the same label, pass `within(overlap, labels)`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import box_iou


def fast_nms(overlap: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Fast NMS (YOLACT, Bolya et al. 2019, §4.1): remove instances overlapped by any instance of higher score."""
    return scores * (_overlap_with_better(overlap, scores).amax(0) <= threshold) if len(scores) else scores.clone()


def matrix_nms(overlap: Tensor, scores: Tensor, threshold: float = 0.0, sigma: float = 0.5) -> Tensor:
    """Matrix NMS (SOLOv2, Wang et al. 2020): Gaussian soft NMS in one step.

    The decay is smaller if the instance of higher score is itself likely to be suppressed. There is no threshold.
    """
    if not len(scores):
        return scores.clone()
    overlap = _overlap_with_better(overlap, scores)
    doubt = overlap.amax(0)  # [n]; highest overlap of each instance with one of higher score
    return scores * (-(overlap**2 - doubt[:, None] ** 2) / sigma).exp().amin(0).clamp(max=1)


NMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"fast": fast_nms, "matrix": matrix_nms}


def within(overlap: Tensor, labels: Tensor) -> Tensor:
    """Overlap [n, n] of instances with the same label [n], zero between different labels."""
    return overlap * (labels[:, None] == labels)


def suppress(overlap: Tensor, threshold: float) -> Tensor:
    """Fast NMS for instances in order of descending score. overlap [n, n] -> keep [n] bool."""
    return overlap.triu(diagonal=1).amax(0) <= threshold if len(overlap) else torch.ones(0, dtype=torch.bool)


def fast_box_nms(boxes: Tensor, threshold: float) -> Tensor:
    """boxes [n, 4] xyxy in order of descending score -> keep [n] bool."""
    return suppress(box_iou(boxes, boxes), threshold).to(boxes.device)


def _overlap_with_better(overlap: Tensor, scores: Tensor) -> Tensor:
    """overlap [n, n] where the row has a higher score than the column, zero elsewhere; ties go to the first."""
    place = torch.empty_like(scores, dtype=torch.long)
    order = scores.argsort(descending=True, stable=True)
    place[order] = torch.arange(len(scores), device=scores.device)
    return overlap * (place[:, None] < place)
