"""Locations of the ConceptHead for a box or for clicks."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from ovsam.modeling.outputs import ConceptOutput

# Exponents for clicks, chosen on the calibration photographs of ovsam-tiny.
TRUST, SMALL = 0.25, -0.2


def boxed_locations(concepts: ConceptOutput, boxes: Tensor, trust: float = 0.5) -> Tensor:
    """boxes [B, P, 4] -> [B, P]: the location with the highest product of its IoU with the box and objectness ** trust.
    An empty box has IoU 0 with every location."""
    fit = torch.stack([box_iou(given, found) for given, found in zip(boxes, concepts.boxes.float(), strict=True)])
    return (fit.nan_to_num() * concepts.objectness.float().sigmoid()[:, None] ** trust).argmax(-1)  # of [B, P, L]


def pointed_locations(concepts: ConceptOutput, points: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Clicks -> the `count` locations with the highest product of objectness ** TRUST, the mean centre-ness of the
    positive clicks in the box (FCOS, Tian et al. 2019, eq. 3), all of which have to lie inside, and the side of the box
    ** SMALL: of two boxes around a click the smaller one is more often meant.

    Args:
        points: [B, P, N, 2] xy in pixels; labels: [B, P, N], 1 inside, 0 outside; others are ignored.

    Returns:
        index [B, P, count] and the products [B, P, count], 0 where the clicks do not lie inside.
    """
    low = points[..., None, :] - concepts.boxes[:, None, None, :, :2]  # [B, P, N, L, 2]
    high = concepts.boxes[:, None, None, :, 2:] - points[..., None, :]
    near, far = torch.minimum(low, high).clamp(min=0), torch.maximum(low, high).clamp(min=1e-3)
    central = (near / far).prod(-1).sqrt()  # [B, P, N, L]
    positive = (labels == 1)[..., None]
    inside = ((central > 0) | ~positive).all(2)
    mean = (central * positive).sum(2) / positive.sum(2).clamp(min=1)  # [B, P, L]
    side = (concepts.boxes[..., 2:] - concepts.boxes[..., :2]).clamp(min=1).prod(-1).sqrt()  # [B, L]
    fit = mean * inside * (concepts.objectness.float().sigmoid() ** TRUST * side**SMALL)[:, None]
    best, index = fit.topk(min(count, fit.shape[-1]), dim=-1)
    return index, best


def agreement(masks: Tensor, regions: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    """Probability that the masks of k candidates contain the positive clicks and not the negative ones, [B, P, k].

    Args:
        masks: logits [B, P*k, r, r] inside the regions [B, P*k, 4]; outside the probability is 0.
        points, labels: see `pointed_locations`.
    """
    b, p, n = labels.shape
    low, high = regions.view(b, p, -1, 1, 4).split(2, -1)  # [B, P, k, 1, 2]
    place = 2 * (points[:, :, None] - low) / (high - low) - 1  # [B, P, k, N, 2] in [-1, 1]
    sampled = F.grid_sample(
        masks.flatten(0, 1)[:, None].float(), place.flatten(0, 2)[:, None], align_corners=False, padding_mode="border"
    )  # [B*P*k, 1, 1, N]
    held = sampled[:, 0, 0].view(place.shape[:-1]).sigmoid() * (place.abs() <= 1).all(-1)
    label = labels[:, :, None]
    return torch.where(label == 1, held, torch.where(label == 0, 1 - held, torch.ones_like(held))).prod(-1)
