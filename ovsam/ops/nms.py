"""Non-maximum suppression on any pairwise overlap: for boxes, masks or run lengths.

Each function of `NMS` takes overlap [n, n] (symmetric, in [0, 1]), scores [n] in [0, 1] in any order, and a threshold,
and returns new scores [n]: 0 for suppressed instances, lowered scores for soft methods. To suppress only among
instances of the same label, pass `within(overlap, labels)`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import box_iou


def greedy_nms(overlap: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Keep the instance of highest score and remove those that overlap it by more than the threshold; repeat."""
    kept = scores.clone()
    for best in scores.argsort(descending=True, stable=True).tolist():
        if kept[best] > 0:
            beaten = overlap[best] > threshold
            beaten[best] = False
            kept[beaten] = 0
    return kept


def fast_nms(overlap: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Fast NMS (YOLACT, Bolya et al. 2019, §4.1): remove instances overlapped by any instance of higher score."""
    return scores * (_overlap_with_better(overlap, scores).amax(0) <= threshold) if len(scores) else scores.clone()


def soft_nms(overlap: Tensor, scores: Tensor, threshold: float, sigma: float | None = None) -> Tensor:
    """Soft-NMS (Bodla et al. 2017, §3): overlap with an instance of higher score lowers the score.

    An overlap o over the threshold multiplies it by 1 - o (linear); with `sigma` any overlap by exp(-o^2 / sigma).
    """
    decay = torch.where(overlap > threshold, 1 - overlap, 1.0) if sigma is None else (-(overlap**2) / sigma).exp()
    return _one_by_one(scores, lambda best: decay[best])


def matrix_nms(overlap: Tensor, scores: Tensor, threshold: float = 0.0, sigma: float = 0.5) -> Tensor:
    """Matrix NMS (SOLOv2, Wang et al. 2020): Gaussian soft NMS in one step.

    The decay is smaller if the instance of higher score is itself likely to be suppressed. There is no threshold.
    """
    if not len(scores):
        return scores.clone()
    overlap = _overlap_with_better(overlap, scores)
    doubt = overlap.amax(0)  # [n]; highest overlap of each instance with one of higher score
    return scores * (-(overlap**2 - doubt[:, None] ** 2) / sigma).exp().amin(0).clamp(max=1)


def density_nms(overlap: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """NOH-NMS (Zhou et al. 2020) with the density of nearby objects estimated from neighbouring proposals; the network
    of the paper that predicts it (the "hallucinator") is not implemented.

    An instance that overlaps a kept one by more than the threshold is removed, unless it is likely to be another
    object: then its score is multiplied by that likelihood. A neighbouring proposal is evidence of another object if
    the instance overlaps it more than either of them overlaps the kept one; the likelihood is the highest such excess,
    divided by 1 - threshold. Without crowding this equals greedy NMS.
    """
    others = overlap.clone().fill_diagonal_(0)  # an instance is not its own neighbour

    def decay(best: int) -> Tensor:
        near = overlap[best]
        excess = others - torch.maximum(
            near[:, None], near
        )  # [n, n]; row: the neighbour, column: the overlapping instance
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


def _one_by_one(scores: Tensor, decay: Callable[[int], Tensor]) -> Tensor:
    """Select the highest remaining score at each step and multiply the other remaining ones by decay(best) [n]."""
    left, waiting = scores.clone(), torch.ones_like(scores, dtype=torch.bool)
    for _ in range(len(scores)):
        best = int(torch.where(waiting, left, -1).argmax())
        if left[best] <= 0:
            break
        waiting[best] = False
        left = torch.where(waiting, left * decay(best), left)
    return left
