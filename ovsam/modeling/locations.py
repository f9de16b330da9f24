"""ConceptHead location for a box or click prompt; its prototype mask supports the mask decoder."""

import torch
from torch import Tensor
from torchvision.ops import box_iou

from ovsam.modeling.outputs import ConceptOutput


def boxed_locations(concepts: ConceptOutput, boxes: Tensor, trust: float = 0.5) -> Tensor:
    """boxes [B, P, 4] -> [B, P]: the location with the highest product of its IoU with the box and objectness ** trust.
    An empty box has IoU 0 with every location."""
    fit = torch.stack([box_iou(given, found) for given, found in zip(boxes, concepts.boxes.float(), strict=True)])
    return (fit.nan_to_num() * concepts.objectness.float().sigmoid()[:, None] ** trust).argmax(-1)  # of [B, P, L]


def pointed_locations(concepts: ConceptOutput, points: Tensor, labels: Tensor, stride: float) -> Tensor:
    """Clicks -> [B, P]: the location of highest objectness whose mask contains the positive clicks and no negative
    ones.

    Args:
        points: [B, P, N, 2] xy in pixels; labels: [B, P, N], 1 inside, 0 outside; others are ignored.
        stride: side of a prototype cell in pixels.
    """
    height, width = concepts.prototypes.shape[-2:]
    cell = (points / stride).long()
    cell = cell[..., 1].clamp(0, height - 1) * width + cell[..., 0].clamp(0, width - 1)  # [B, P, N]
    at = concepts.prototypes.flatten(2).transpose(1, 2)  # [B, h*w, Q]
    at = at.gather(1, cell.flatten(1)[..., None].expand(-1, -1, at.shape[-1])).view(*cell.shape, -1)  # [B, P, N, Q]
    held = torch.einsum("bpnq,blq->bpnl", at, concepts.coefficients).float().sigmoid()
    low, high = concepts.boxes[:, None, None, :, :2], concepts.boxes[:, None, None, :, 2:]
    boxed = ((points[..., None, :] > low) & (points[..., None, :] < high)).all(-1)  # [B, P, N, L]
    held = held * boxed  # a prototype mask ends at its box
    label = labels[..., None]
    agrees = torch.where(label == 1, held, torch.where(label == 0, 1 - held, torch.ones_like(held)))
    return (agrees.prod(2) * concepts.objectness.float().sigmoid()[:, None]).argmax(-1)
