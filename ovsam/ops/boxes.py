"""Boxes of masks, and their overlap."""

import torch
from torch import Tensor


def masks_to_boxes(masks: Tensor) -> Tensor:
    """masks [..., H, W] bool -> boxes [..., 4] float xyxy in pixels, x2 and y2 exclusive; zeros for empty masks."""
    h, w = masks.shape[-2:]
    rows, columns = masks.any(-1), masks.any(-2)  # [..., H], [..., W]
    y, x = torch.arange(h, device=masks.device), torch.arange(w, device=masks.device)
    x0 = torch.where(columns, x, w).amin(-1)
    y0 = torch.where(rows, y, h).amin(-1)
    x1 = torch.where(columns, x + 1, 0).amax(-1)
    y1 = torch.where(rows, y + 1, 0).amax(-1)
    boxes = torch.stack([x0, y0, x1, y1], -1).float()
    return torch.where(columns.any(-1, keepdim=True), boxes, torch.zeros_like(boxes))


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of each box with the other at the same place, both [..., 4] xyxy -> [...]."""
    shared = torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(boxes[..., :2], others[..., :2])
    shared = shared.clamp(min=0).prod(-1)
    areas = ((box[..., 2:] - box[..., :2]).prod(-1) for box in (boxes, others))
    return shared / (sum(areas) - shared).clamp(min=1e-6)
