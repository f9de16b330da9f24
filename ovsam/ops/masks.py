"""Masks as tensors and arrays."""

import numpy as np
import torch
from torch import Tensor

CHUNK = 64  # number of pixels whose distance is computed at a time
EMPTY = -20.0  # logit of a pixel that is certainly not in the mask
INSIDE, OUTSIDE = 10.0, -10.0  # logits of a mask that is given as bool, as SAM's mask prompts are scaled


def mask_logits(masks: Tensor) -> Tensor:
    """Masks, bool or already logits -> float logits of the same shape; pad them with OUTSIDE."""
    return torch.where(masks, INSIDE, OUTSIDE) if masks.dtype == torch.bool else masks.float()


def crop(masks: Tensor, boxes: Tensor) -> Tensor:
    """Make mask logits [B, I, h, w] very low outside their box [B, I, 4] (in cells) plus one cell."""
    y = torch.arange(masks.shape[-2], device=masks.device) + 0.5
    x = torch.arange(masks.shape[-1], device=masks.device) + 0.5
    columns = (x > boxes[..., 0:1] - 1) & (x < boxes[..., 2:3] + 1)  # [B, I, w]
    rows = (y > boxes[..., 1:2] - 1) & (y < boxes[..., 3:4] + 1)  # [B, I, h]
    return masks.masked_fill(~(rows[..., :, None] & columns[..., None, :]), EMPTY)


def mask_overlap(masks: Tensor, others: Tensor | None = None) -> Tensor:
    """IoU of each pair of masks. masks [n, h, w] bool, others [m, h, w] bool (default: the same) -> [n, m]"""
    one = masks.flatten(1).float()
    two = one if others is None else others.flatten(1).float()
    shared = one @ two.T
    return shared / (one.sum(1)[:, None] + two.sum(1)[None] - shared).clamp(min=1)


def deepest_point(mask: np.ndarray) -> tuple[int, int]:
    """Return (x, y) of the pixel of `mask` [H, W] bool with the highest Euclidean distance to the outside."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    inside = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1], 1)  # the border counts as outside
    column, row = _line_distance(inside), _line_distance(inside.T).T
    # The distance within the column or the row is an upper bound: only pixels with a high bound are computed.
    bound = np.minimum(column, row).ravel()
    order = np.argsort(-bound, kind="stable")
    x, best, place = np.arange(inside.shape[1]), -1, 0
    for start in range(0, len(order), CHUNK):
        some = order[start : start + CHUNK]
        if bound[some[0]] ** 2 < best:
            break
        squared = ((some[:, None] % len(x) - x) ** 2 + column[some // len(x)] ** 2).min(1)  # over all columns
        deepest = int(squared.max())
        first = int(some[squared == deepest].min())  # of equal distances the topmost, then the leftmost
        if deepest > best or (deepest == best and first < place):
            best, place = deepest, first
    return place % len(x) - 1 + left, place // len(x) - 1 + top


def _line_distance(inside: np.ndarray) -> np.ndarray:
    """Distance of every pixel [H, W] to the nearest outside pixel in its column, 0 outside."""
    y = np.arange(len(inside))[:, None]
    above = np.maximum.accumulate(np.where(inside, -1, y), axis=0)
    below = np.minimum.accumulate(np.where(inside, len(inside), y)[::-1], axis=0)[::-1]
    return np.minimum(y - above, below - y)
