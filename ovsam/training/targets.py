"""From a scene's index map to what the losses compare with: object masks, boxes, click points."""

import torch
from torch import Tensor


def object_masks(index_map: Tensor, objects: int) -> Tensor:
    """index_map [B, H, W] -> masks [B, objects, H, W] bool; object i owns the pixels that hold i + 1."""
    ids = torch.arange(1, objects + 1, device=index_map.device, dtype=index_map.dtype)
    return index_map[:, None] == ids[None, :, None, None]


def mask_boxes(masks: Tensor) -> Tensor:
    """masks [..., H, W] bool -> boxes [..., 4] float xyxy in pixels, the far edge exclusive; zeros for empty masks."""
    h, w = masks.shape[-2:]
    rows, columns = masks.any(-1), masks.any(-2)  # [..., H], [..., W]
    y, x = torch.arange(h, device=masks.device), torch.arange(w, device=masks.device)
    x0 = torch.where(columns, x, w).amin(-1)
    y0 = torch.where(rows, y, h).amin(-1)
    x1 = torch.where(columns, x + 1, 0).amax(-1)
    y1 = torch.where(rows, y + 1, 0).amax(-1)
    boxes = torch.stack([x0, y0, x1, y1], -1).float()
    return torch.where(columns.any(-1, keepdim=True), boxes, torch.zeros_like(boxes))


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
