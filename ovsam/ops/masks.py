"""Masks as tensors."""

import torch
from torch import Tensor


def crop(masks: Tensor, boxes: Tensor) -> Tensor:
    """Mask logits [B, I, h, w] are made certainly empty outside their box [B, I, 4] (in cells), grown by a cell."""
    y = torch.arange(masks.shape[-2], device=masks.device) + 0.5
    x = torch.arange(masks.shape[-1], device=masks.device) + 0.5
    columns = (x > boxes[..., 0:1] - 1) & (x < boxes[..., 2:3] + 1)  # [B, I, w]
    rows = (y > boxes[..., 1:2] - 1) & (y < boxes[..., 3:4] + 1)  # [B, I, h]
    return masks.masked_fill(~(rows[..., :, None] & columns[..., None, :]), -20.0)


def mask_overlap(masks: Tensor) -> Tensor:
    """IoU of each pair of masks. masks [n, h, w] bool -> [n, n]"""
    flat = masks.flatten(1).float()
    shared = flat @ flat.T
    area = flat.sum(1)
    return shared / (area[:, None] + area[None] - shared).clamp(min=1)
