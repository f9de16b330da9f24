"""Non-maximum suppression as matrix operations."""

import torch
from torch import Tensor
from torchvision.ops import box_iou


def suppress(overlap: Tensor, threshold: float) -> Tensor:
    """Fast NMS (YOLACT, Bolya et al. 2019, §4.1) on any pairwise overlap.

    Args:
        overlap: [n, n], rows and columns in order of falling score.
        threshold: an instance goes if a better one, kept or not, overlaps it by more.

    Returns:
        keep [n] bool.
    """
    return overlap.triu(diagonal=1).amax(0) <= threshold if len(overlap) else torch.ones(0, dtype=torch.bool)


def fast_box_nms(boxes: Tensor, threshold: float) -> Tensor:
    """boxes [n, 4] xyxy in order of falling score -> keep [n] bool."""
    return suppress(box_iou(boxes, boxes), threshold).to(boxes.device)


def mask_overlap(masks: Tensor) -> Tensor:
    """IoU of each pair of masks. masks [n, h, w] bool -> [n, n]"""
    flat = masks.flatten(1).float()
    shared = flat @ flat.T
    area = flat.sum(1)
    return shared / (area[:, None] + area[None] - shared).clamp(min=1)
