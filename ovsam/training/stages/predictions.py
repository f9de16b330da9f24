"""Predictions of the stages for sample images of a run."""

import torch
from torch import Tensor

from ovsam.modeling.sam import DecodedMasks

Found = tuple[Tensor, Tensor, Tensor]  # masks bool [n, h, w], word ids [n] (-1: no name), scores [n]


def prompted(decoded: DecodedMasks, masks: Tensor, word_ids: Tensor) -> list[Found]:
    """Return the single mask of every prompt of a true object; masks [B, O, H, W], word_ids [B, O]."""
    there = masks.flatten(2).any(-1)  # [B, O]
    scores = torch.ones_like(word_ids, dtype=torch.float32) if decoded.iou is None else decoded.iou[:, :, 0].float()
    found = decoded.masks[:, :, 0] > 0
    return [(found[b][there[b]], word_ids[b][there[b]], scores[b][there[b]]) for b in range(len(masks))]
