"""Masks, as numpy arrays or tensors. `paste`, `add_prior`, `mean_masks` and `follow_clicks` take tensors alone."""

import math
from typing import TYPE_CHECKING

import numpy as np

from ovsam.ops.arrays import Array, count, floats, is_bool, namespace, sigmoid

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 64  # number of pixels whose distance is computed at a time
EMPTY = -20.0  # logit of a pixel that is certainly not in the mask
PRIOR = 5.0  # highest absolute logit of a mask that the decoder corrects
# A click that the mask contradicts: its new logit, the width of the change in sides of the mask, and the limit of the
# old logits. Chosen on the calibration photographs of ovsam-tiny.
CLICK_LOGIT, CLICK_WIDTH, CLICK_LIMIT = 4.0, 0.3, 8.0
INSIDE, OUTSIDE = 10.0, -10.0  # logits of a mask that is given as bool, as SAM's mask prompts are scaled


def mask_logits(masks: Array) -> Array:
    """Masks, bool or already logits -> float logits of the same shape; pad them with OUTSIDE."""
    xp = namespace(masks)
    return floats(xp.where(masks, INSIDE, OUTSIDE) if is_bool(masks) else masks)


def paste(masks: "Tensor", boxes: "Tensor", size: tuple[int, int]) -> "Tensor":
    """Mask logits inside boxes -> mask logits of the image, EMPTY outside of the boxes.

    Bilinear interpolation is separable, so it is the product of three matrices.

    Args:
        masks: [B, I, r, r].
        boxes: [B, I, 4] xyxy in pixels of the output.
        size: height and width of the output.

    Returns:
        [B, I, height, width]
    """
    low, high = boxes[..., :2].float(), boxes[..., 2:].float()
    inside, weights = [], []
    for axis, length in ((1, size[0]), (0, size[1])):
        pixel = count(masks, 0, length) + 0.5
        start, end = low[..., axis, None], high[..., axis, None]
        cells = masks.shape[-1]
        place = ((pixel - start) / (end - start).clamp(min=1e-3) * cells - 0.5).clamp(0, cells - 1)  # [B, I, length]
        weight = (1 - (place[..., None] - count(masks, 0, cells)).abs()).clamp(min=0)
        weights.append(weight)  # [B, I, length, r]
        inside.append((pixel >= start) & (pixel <= end))
    pasted = weights[0] @ masks.float() @ weights[1].transpose(-1, -2)
    return pasted.masked_fill(~(inside[0][..., :, None] & inside[1][..., None, :]), EMPTY)


def add_prior(masks: "Tensor", prior: "Tensor", weight: float = 1.0) -> "Tensor":
    """The masks of a decoder that corrects its mask prompts, in the manner of a residual network.

    Args:
        masks: logits of the decoder [B, P, M, h, w].
        prior: logits of the mask prompts [B, P, H, W], of the same resolution or a finer one. They are limited to
            PRIOR, so that clicks can overrule them.
        weight: factor of the prior.

    Returns:
        [B, P, M, H, W]
    """
    import torch.nn.functional as F

    size, grid = masks.shape[:3], prior.shape[-2:]
    if masks.shape[-2:] != grid:
        masks = F.interpolate(masks.flatten(0, 1), grid, mode="bilinear").view(*size, *grid)
    return masks + weight * prior[:, :, None].clamp(-PRIOR, PRIOR)


def mean_masks(given: "Tensor", masks: "Tensor", weight: "Tensor") -> "Tensor":
    """Weighted mean of two sets of mask logits, each limited to PRIOR.

    Args:
        given: [B, P, h, w] with weight 1; resized to the other ones.
        masks: [B, P, H, W]; weight: their weight [B, P].

    Returns:
        [B, P, H, W]
    """
    import torch.nn.functional as F

    if given.shape[-2:] != masks.shape[-2:]:
        given = F.interpolate(given, masks.shape[-2:], mode="bilinear")
    weight = weight[..., None, None]
    return (given.clamp(-PRIOR, PRIOR) + weight * masks.clamp(-PRIOR, PRIOR)) / (1 + weight)


def follow_clicks(masks: "Tensor", points: "Tensor", labels: "Tensor") -> "Tensor":
    """Change masks around clicks that they contradict: a Gaussian is added whose width depends on the size of the mask,
    so that positive clicks are inside and negative ones outside.

    Args:
        masks: logits [B, P, h, w].
        points: clicks [B, P, N, 2] xy in pixels of the mask.
        labels: [B, P, N], 1 inside, 0 outside; others are ignored.

    Returns:
        [B, P, h, w]; masks that agree with their clicks are unchanged.
    """
    h, w = masks.shape[-2:]
    limited = masks.clamp(-CLICK_LIMIT, CLICK_LIMIT)
    column, row = points[..., 0].long().clamp(0, w - 1), points[..., 1].long().clamp(0, h - 1)  # [B, P, N]
    clicked = limited.flatten(2).gather(-1, row * w + column)
    raised = (CLICK_LOGIT - clicked).clamp(min=0) * (labels == 1)
    lowered = (CLICK_LOGIT + clicked).clamp(min=0) * (labels == 0)
    width = CLICK_WIDTH * (masks > 0).flatten(2).sum(-1).clamp(min=16).sqrt()[..., None, None]  # [B, P, 1, 1]
    x, y = (
        (-0.5 * ((count(masks, 0, side) + 0.5 - points[..., axis, None]) / width) ** 2).exp()  # [B, P, N, w], [.., h]
        for axis, side in ((0, w), (1, h))
    )
    near = y[..., None] * x[..., None, :]  # [B, P, N, h, w]
    change = (raised[..., None, None] * near).amax(2) - (lowered[..., None, None] * near).amax(2)
    contradicted = (raised + lowered).sum(-1)[..., None, None] > 0
    return masks.where(~contradicted, limited + change)


def certainty(masks: Array) -> Array:
    """Mean probability of the pixels inside each mask, 0 for an empty one. Logits [..., h, w] -> [...]"""
    probability, inside = sigmoid(masks), masks > 0
    return (probability * inside).sum((-1, -2)) / inside.sum((-1, -2)).clip(min=1)


def mask_overlap(masks: Array, others: Array | None = None) -> Array:
    """IoU of each pair of masks. masks [n, h, w] bool, others [m, h, w] bool (default: the same) -> [n, m]"""
    one = floats(masks.reshape(len(masks), math.prod(masks.shape[1:])))
    two = one if others is None else floats(others.reshape(len(others), math.prod(others.shape[1:])))
    shared = one @ two.T
    return shared / (one.sum(1)[:, None] + two.sum(1)[None] - shared).clip(min=1)


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
