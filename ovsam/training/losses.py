"""Losses shared by the stages. Each returns one value per row, so that callers choose weights and minima."""

import torch
import torch.nn.functional as F
from torch import Tensor


def focal_loss(logits: Tensor, targets: Tensor, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss (Lin et al. 2017) without class weights, element-wise; gamma 0 is cross entropy."""
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    if gamma == 0:
        return loss
    probability = logits.sigmoid()
    return loss * (probability * (1 - targets) + (1 - probability) * targets) ** gamma


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


def giou_loss(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Generalised IoU loss (Rezatofighi et al. 2019) and plain IoU of paired xyxy boxes [n, 4] -> [n], [n]."""
    left, right = torch.maximum(boxes[:, :2], targets[:, :2]), torch.minimum(boxes[:, 2:], targets[:, 2:])
    overlap = (right - left).clamp(min=0).prod(-1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(-1) + (targets[:, 2:] - targets[:, :2]).prod(-1) - overlap
    iou = overlap / union.clamp(min=1e-6)
    hull = torch.maximum(boxes[:, 2:], targets[:, 2:]) - torch.minimum(boxes[:, :2], targets[:, :2])
    hull_area = hull.clamp(min=0).prod(-1)
    return 1 - iou + (hull_area - union) / hull_area.clamp(min=1e-6), iou
