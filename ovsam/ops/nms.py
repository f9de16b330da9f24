"""Non-maximum suppression on any pairwise overlap: of boxes, of masks, of run lengths.

Each function of `NMS` takes overlap [n, n] (symmetric, in [0, 1]), scores [n] in [0, 1] in any order, and a threshold,
and returns new scores [n]: zero for what is suppressed, less for what is only doubted. To suppress each word's
instances among themselves, pass `within(overlap, labels)`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import box_iou


def greedy_nms(overlap: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """The best one stays and removes what overlaps it by more than the threshold; then the best of the rest, and on."""
    kept = scores.clone()
    for best in scores.argsort(descending=True, stable=True).tolist():
        if kept[best] > 0:
            beaten = overlap[best] > threshold
            beaten[best] = False
            kept[beaten] = 0
    return kept


def fast_nms(overlap: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """YOLACT (Bolya et al. 2019, §4.1): goes what a better one, itself kept or not, overlaps by more than that."""
    return scores * (_overlap_with_better(overlap, scores).amax(0) <= threshold) if len(scores) else scores.clone()


def soft_nms(overlap: Tensor, scores: Tensor, threshold: float, sigma: float | None = None) -> Tensor:
    """Soft-NMS (Bodla et al. 2017, §3): what overlaps a better one loses score, and is compared by what it has left.

    An overlap o over the threshold costs a factor 1 - o (linear); with `sigma` any overlap costs exp(-o^2 / sigma).
    """
    decay = torch.where(overlap > threshold, 1 - overlap, 1.0) if sigma is None else (-(overlap**2) / sigma).exp()
    return _one_by_one(scores, lambda best: decay[best])


def matrix_nms(overlap: Tensor, scores: Tensor, threshold: float = 0.0, sigma: float = 0.5) -> Tensor:
    """Matrix NMS (SOLOv2, Wang et al. 2020): Gaussian soft NMS in one step.

    An overlap costs less the more likely it is that the better one is itself suppressed. There is no threshold.
    """
    if not len(scores):
        return scores.clone()
    overlap = _overlap_with_better(overlap, scores)
    doubt = overlap.amax(0)  # [n]; of the one that suppresses
    return scores * (-(overlap**2 - doubt[:, None] ** 2) / sigma).exp().amin(0).clamp(max=1)


def density_nms(overlap: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """NOH-NMS (Zhou et al. 2020) with the density of nearby objects taken from neighbouring proposals; their
    network that predicts it (the "hallucinator") is not built.

    What overlaps a kept one by more than the threshold goes, unless it is likely to be another object beside it: then
    its score is multiplied by that likelihood. A neighbouring proposal is a sign of another object as far as the
    doubted one overlaps it more than either of the two overlaps the kept one; the likelihood is the largest such
    excess, as a share of 1 - threshold. Where nothing is crowded this is greedy NMS.
    """
    others = overlap.clone().fill_diagonal_(0)  # nothing is its own neighbour

    def decay(best: int) -> Tensor:
        near = overlap[best]
        excess = others - torch.maximum(near[:, None], near)  # [n, n]; row: the neighbour, column: the doubted one
        likelihood = (excess.amax(0) / (1 - threshold)).clamp(0, 1)
        return torch.where(near > threshold, likelihood, 1.0)

    return _one_by_one(scores, decay)


NMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "fast": fast_nms,
    "greedy": greedy_nms,
    "soft": soft_nms,
    "matrix": matrix_nms,
    "density": density_nms,
}


def within(overlap: Tensor, labels: Tensor) -> Tensor:
    """The overlap [n, n] of instances of one label [n], zero between those of different ones."""
    return overlap * (labels[:, None] == labels)


def suppress(overlap: Tensor, threshold: float) -> Tensor:
    """Fast NMS of what already stands in order of falling score. overlap [n, n] -> keep [n] bool."""
    return overlap.triu(diagonal=1).amax(0) <= threshold if len(overlap) else torch.ones(0, dtype=torch.bool)


def fast_box_nms(boxes: Tensor, threshold: float) -> Tensor:
    """boxes [n, 4] xyxy in order of falling score -> keep [n] bool."""
    return suppress(box_iou(boxes, boxes), threshold).to(boxes.device)


def _overlap_with_better(overlap: Tensor, scores: Tensor) -> Tensor:
    """overlap [n, n] where the row's score is better than the column's, zero elsewhere; ties go to the first."""
    place = torch.empty_like(scores, dtype=torch.long)
    order = scores.argsort(descending=True, stable=True)
    place[order] = torch.arange(len(scores), device=scores.device)
    return overlap * (place[:, None] < place)


def _one_by_one(scores: Tensor, decay: Callable[[int], Tensor]) -> Tensor:
    """Multiply the scores of all that still wait by decay(best) [n], taking the best of them at each step."""
    left, waiting = scores.clone(), torch.ones_like(scores, dtype=torch.bool)
    for _ in range(len(scores)):
        best = int(torch.where(waiting, left, -1).argmax())
        if left[best] <= 0:
            break
        waiting[best] = False
        left = torch.where(waiting, left * decay(best), left)
    return left
