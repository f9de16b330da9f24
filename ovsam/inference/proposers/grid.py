"""`grid`: SAM's automatic mask generator (Kirillov et al. 2023, appendix B) over features that are computed once."""

import torch
from torch import Tensor

from ovsam.inference.proposers.base import Proposals, Question
from ovsam.ops.boxes import masks_to_boxes
from ovsam.ops.masks import mask_overlap
from ovsam.ops.nms import fast_box_nms, suppress

CHUNK = 64  # points that are decoded at a time: their masks, three each, are what takes memory


@torch.no_grad()
def grid(
    question: Question,
    points_per_side: int = 32,
    pred_iou_threshold: float = 0.8,
    stability_threshold: float = 0.9,
    stability_offset: float = 1.0,
    nms_threshold: float = 0.7,
    most: int = 200,
) -> Proposals:
    """Three masks for each of a grid of points; the confident, stable, distinct ones are the proposals.

    Args:
        pred_iou_threshold: minimum predicted IoU.
        stability_threshold: minimum IoU between the mask cut at +offset and at -offset of its logits.
        nms_threshold: of two masks that overlap more, the one with the lower predicted IoU goes.
        most: maximum number returned, highest predicted IoU first.

    Raises:
        InputError: text queries, but no part of the model classifies.
    """
    question.check_named()
    side = question.model.sam
    features = question.features.sam
    width, height = question.extent
    x = (torch.arange(points_per_side) + 0.5) / points_per_side
    points = torch.stack([*torch.meshgrid(x * width, x * height, indexing="xy")], -1).view(-1, 2)
    kept_masks, kept_quality = [], []
    for chunk in points.to(features.embedding.device).split(CHUNK):
        decoded = side.select_masks(side.decode(features, input_points=chunk[None, :, None]), multimask_output=True)
        masks = decoded.masks[0].flatten(0, 1)  # [1, P, 3, h, w] -> [P*3, h, w]
        quality = decoded.iou[0].flatten()
        good = quality > pred_iou_threshold
        masks, quality = masks[good], quality[good]
        good = stability(masks, stability_offset) > stability_threshold
        kept_masks.append(masks[good])
        kept_quality.append(quality[good])
    masks, quality = torch.cat(kept_masks), torch.cat(kept_quality)
    order = quality.argsort(descending=True)
    order = order[fast_box_nms(masks_to_boxes(masks[order] > 0), nms_threshold)]
    order = order[suppress(mask_overlap(masks[order] > 0), nms_threshold)][:most]
    return Proposals(masks=question.masks_from_model(masks[order]), scores=quality[order].clamp(0, 1))


def stability(masks: Tensor, offset: float) -> Tensor:
    """mask logits [n, h, w] -> IoU of each mask cut at +offset and at -offset, [n]; 0 for an empty mask."""
    inner, outer = (masks > offset).sum((1, 2)), (masks > -offset).sum((1, 2))
    return inner / outer.clamp(min=1)
