"""Targets and prompts from the object masks of a batch: owners of pixels, boxes, click points."""

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 64  # lowest area in pixels of an object with a loss


def visible_objects(masks: Tensor, word_ids: Tensor) -> Tensor:
    """masks [B, O, H, W], word_ids [B, O] -> [B, O] bool: objects with a class name and enough pixels."""
    return (masks.flatten(2).sum(-1) >= LEAST) & (word_ids >= 0)


def pixel_owners(masks: Tensor, stride: int) -> Tensor:
    """masks [B, O, H, W] -> [B, H/stride, W/stride] index of the object at the middle pixel of each cell, -1 without
    one. If masks overlap, the smallest object owns the pixel: it is in front or a part."""
    area = masks.flatten(2).sum(-1)[..., None, None]  # [B, O, 1, 1]
    here = masks[..., stride // 2 :: stride, stride // 2 :: stride]
    smallest, owner = torch.where(here, area, torch.iinfo(area.dtype).max).min(1)
    return torch.where(here.any(1), owner, -1)


def choose_objects(masks: Tensor, count: int, wanted: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Choose up to `count` random objects of each image, those that are `wanted` [B, O] bool (default: visible ones)
    first. masks [B, O, H, W] -> their masks [B, P, H, W], wanted [B, P] and index [B, P]."""
    if wanted is None:
        wanted = masks.flatten(2).sum(-1) >= LEAST
    count = min(count, wanted.shape[1])
    keep = (torch.rand(wanted.shape, device=wanted.device) + wanted).topk(count, dim=1).indices
    return masks.gather(1, keep[:, :, None, None].expand(-1, -1, *masks.shape[2:])), wanted.gather(1, keep), keep


def resize_masks(masks: Tensor, size: int) -> Tensor:
    """masks [B, O, H, W] bool -> [B, O, size, size] bool: cells of which more than half is inside."""
    return masks if masks.shape[-1] == size else F.interpolate(masks.float(), (size, size), mode="area") > 0.5


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """tensor [B, O, X], index [B, n] -> [B, n, X]"""
    return tensor.take_along_dim(index[..., None], 1)


def corrective_clicks(predicted: Tensor, truth: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Draw one click in each region where two masks [B, P, h, w] bool differ: positive in false negatives, negative in
    false positives, label -1 (no click) if they agree. Uniform distribution (SAM, appendix A). -> xy in pixels of an
    image of `size`, [B, P, 1, 2], and labels [B, P, 1]."""
    b, p, h, w = truth.shape
    errors = predicted != truth
    cells = random_points(errors.flatten(0, 1)).view(b, p, 1, 2)
    missed = truth.flatten(2).gather(2, (cells[..., 1] * w + cells[..., 0]).long())
    labels = torch.where(errors.flatten(2).any(-1, keepdim=True), missed.long(), -1)
    stride = size / w
    return cells * stride + (stride - 1) / 2, labels  # the middle of the cell, minus SAM's half pixel


def random_points(regions: Tensor) -> Tensor:
    """Draw one random pixel (its centre minus SAM's half pixel, that is, its index) inside each region. regions [n, h,
    w] bool -> [n, 2] xy on the region's own grid; an empty region gives (0, 0)."""
    n, h, w = regions.shape
    index = (torch.rand(n, h * w, device=regions.device) * regions.flatten(1)).argmax(1)
    return torch.stack([index % w, index // w], -1).float()


def jitter_boxes(boxes: Tensor, amount: float, limit: float) -> Tensor:
    """Move each side by normal noise of `amount` times the box size, at most 20 pixels (SAM, appendix A)."""
    size = boxes[..., 2:] - boxes[..., :2]
    noise = (torch.randn_like(boxes) * amount * torch.cat([size, size], -1)).clamp(-20, 20)
    return (boxes + noise).clamp(0, limit)
