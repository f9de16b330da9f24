"""From a scene's index map to what the losses compare with: object masks, boxes, click points."""

import torch
from torch import Tensor


def object_masks(index_map: Tensor, objects: int) -> Tensor:
    """index_map [B, H, W] -> masks [B, objects, H, W] bool; object i owns the pixels that hold i + 1."""
    ids = torch.arange(1, objects + 1, device=index_map.device, dtype=index_map.dtype)
    return index_map[:, None] == ids[None, :, None, None]


def random_points(regions: Tensor) -> Tensor:
    """One random pixel centre (minus SAM's half pixel, so plain pixel indices) inside each region.
    regions [n, h, w] bool -> [n, 2] xy on the region's own grid; an empty region gives (0, 0)."""
    n, h, w = regions.shape
    index = (torch.rand(n, h * w, device=regions.device) * regions.flatten(1)).argmax(1)
    return torch.stack([index % w, index // w], -1).float()


def jitter_boxes(boxes: Tensor, amount: float, limit: float) -> Tensor:
    """Each side moved by normal noise of `amount` times the box's size, at most 20 pixels (SAM, appendix A)."""
    size = boxes[..., 2:] - boxes[..., :2]
    noise = (torch.randn_like(boxes) * amount * torch.cat([size, size], -1)).clamp(-20, 20)
    return (boxes + noise).clamp(0, limit)
