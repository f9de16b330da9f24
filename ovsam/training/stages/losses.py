"""Losses shared by the stages. Each returns one value per row, so that callers choose weights and minima."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from ovsam.ops.boxes import paired_iou


def focal_loss(logits: Tensor, targets: Tensor, gamma: float = 2.0, alpha: float | None = None) -> Tensor:
    """Sigmoid focal loss (Lin et al. 2017), element-wise. `alpha` weights positives and 1 - alpha negatives; None: both
    have weight 1. With gamma 0 it is cross entropy."""
    return sigmoid_focal_loss(logits, targets, alpha=-1 if alpha is None else alpha, gamma=gamma)


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """logits, targets [..., H, W] -> [...]; 1 - Dice with the usual +1 smoothing."""
    probability = logits.sigmoid().flatten(-2)
    targets = targets.flatten(-2)
    overlap = (probability * targets).sum(-1)
    return 1 - (2 * overlap + 1) / (probability.sum(-1) + targets.sum(-1) + 1)


def mask_iou(logits: Tensor, targets: Tensor) -> Tensor:
    """IoU of the thresholded masks. logits, targets [..., H, W] -> [...]"""
    prediction, truth = (logits > 0).flatten(-2), (targets > 0.5).flatten(-2)
    union = (prediction | truth).sum(-1)
    return (prediction & truth).sum(-1) / union.clamp(min=1)


def uncertain_points(logits: Tensor, count: int, oversample: int = 3, share: float = 0.75) -> Tensor:
    """Draw points for mask losses (PointRend, Kirillov et al. 2020): the most uncertain `share` of `count`, chosen
    among `oversample` times as many random points, and random ones. logits [n, H, W] -> [n, count, 2] xy in [0, 1]"""
    points = torch.rand(len(logits), oversample * count, 2, device=logits.device)
    unsure = -at_points(logits, points).abs()
    best = unsure.topk(int(share * count), dim=1).indices
    chosen = points.gather(1, best[..., None].expand(-1, -1, 2))
    rest = torch.rand(len(logits), count - chosen.shape[1], 2, device=logits.device)
    return torch.cat([chosen, rest], 1)


def at_points(maps: Tensor, points: Tensor) -> Tensor:
    """maps [n, H, W] at points [n, k, 2], xy in [0, 1] -> [n, k], bilinear."""
    return F.grid_sample(maps[:, None], 2 * points[:, None] - 1, align_corners=False)[:, 0, 0]


def point_mask_losses(logits: Tensor, targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cross entropy and Dice at `count` points for each mask (Mask2Former, Cheng et al. 2022; Open-Vocabulary SAM takes
    12,544). logits [n, h, w], targets [n, H, W] of 0 and 1, any two resolutions -> [n], [n]"""
    with torch.no_grad():
        points = uncertain_points(logits, count)
        truth = at_points(targets, points)
    values = at_points(logits, points)
    cross_entropy = F.binary_cross_entropy_with_logits(values, truth, reduction="none").mean(-1)
    return cross_entropy, dice_loss(values[:, None], truth[:, None])


def giou_loss(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Generalised IoU loss (Rezatofighi et al. 2019) and plain IoU of paired xyxy boxes [n, 4] -> [n], [n]."""
    return generalized_box_iou_loss(boxes, targets), paired_iou(boxes, targets)
