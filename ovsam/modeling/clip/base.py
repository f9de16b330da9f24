"""What every CLIP side gives and takes, and the pooling they share."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ovsam.modeling.outputs import ClipFeatures

MAX_SEQUENCES = 32768  # attention kernels on GPU launch at most 65,535 sequences at once


class ClipSide(Protocol):
    """An image tower and a text tower that share an embedding space of width D.

    A word's logit is `(cosine + logit_shift) * logit_scale`, as the tower was trained; `softmax` says with which loss.
    Where it is True (CLIP), only differences between words mean something: a softmax over words does, a sigmoid of one
    logit does not. Where it is False (SigLIP, OWLv2), the sigmoid of a word's logit is the probability that this word
    fits, whatever the others are.

    `text_padding` says how phrases are tokenised: "longest", or "max_length" where the tower was trained on its padding
    and reads it (SigLIP). `model_class` is the transformers class whose weights the side holds under `model.`, None for
    other sides.

    A side that finds things by itself (OWLv2) has one method more, `concepts(features) -> ConceptOutput`, and needs no
    ConceptHead beside it; its boxes are in pixels of the side's own input.
    """

    embed_dim: int
    softmax: bool
    logit_scale: torch.Tensor | float
    logit_shift: torch.Tensor | float
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    image_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    max_text_length: int
    text_padding: str
    model_class: type[PreTrainedModel] | None

    def encode_image(self, pixel_values: torch.Tensor) -> ClipFeatures:
        """pixel_values [B, 3, H, W], normalised with `image_mean` and `image_std`."""
        ...

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """input_ids [K, T], T at most `max_text_length` -> [K, D], L2-normalised."""
        ...

    def pool(
        self, features: ClipFeatures, masks: torch.Tensor | None = None, boxes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Class embeddings [B, P, D], L2-normalised, of regions given as masks (probabilities [B, P, Hm, Wm], which
        cover the whole image at any resolution) or boxes ([B, P, 4] xyxy in pixels of the model input)."""
        ...

    def dense(self, features: ClipFeatures) -> torch.Tensor:
        """A class embedding of every location, L2-normalised: [B, D, h, w], with the h, w of `features.pool_map`."""
        ...


def mask_pool(feature_map: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Mean of the features under each mask.

    Masks are resized to the map by area, so an object smaller than one cell still weighs the cell it lies in.

    Args:
        feature_map: [B, C, h, w].
        masks: weights in [0, 1], [B, P, H, W], over the whole image at any resolution.

    Returns:
        [B, P, C]; zeros for an empty mask.
    """
    weights = F.interpolate(masks.float(), size=feature_map.shape[-2:], mode="area").flatten(2)  # -> [B, P, h*w]
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
    return weights.to(feature_map.dtype) @ feature_map.flatten(2).mT  # [B, P, h*w] @ [B, h*w, C] -> [B, P, C]


def boxes_to_masks(boxes: torch.Tensor, size: tuple[int, int], stride: float) -> torch.Tensor:
    """Share of each cell of a grid that lies inside each box.

    Args:
        boxes: xyxy in pixels, [B, P, 4].
        size: rows and columns (h, w) of the grid.
        stride: side of a cell in pixels.

    Returns:
        [B, P, h, w] in [0, 1], differentiable with respect to the boxes.
    """
    cells = boxes.float() / stride
    columns, rows = (torch.arange(n, device=boxes.device) for n in reversed(size))
    x1, y1, x2, y2 = cells.unsqueeze(-1).unbind(-2)  # each [B, P, 1]
    across = (torch.minimum(columns + 1, x2) - torch.maximum(columns, x1)).clamp(min=0)  # [B, P, w]
    down = (torch.minimum(rows + 1, y2) - torch.maximum(rows, y1)).clamp(min=0)  # [B, P, h]
    return down.unsqueeze(-1) * across.unsqueeze(-2)


def region_pool(
    feature_map: torch.Tensor, stride: float, masks: torch.Tensor | None, boxes: torch.Tensor | None
) -> torch.Tensor:
    """Mean of the features [B, C, h, w] under masks, or in boxes where there are no masks -> [B, P, C]."""
    return mask_pool(feature_map, boxes_to_masks(boxes, feature_map.shape[-2:], stride) if masks is None else masks)


def map_blocks(depth: int) -> list[int]:
    """Four blocks, evenly spaced to the last, of a plain vision transformer: the ones whose outputs are its `maps`."""
    return sorted({max(depth * quarter // 4 - 1, 0) for quarter in (1, 2, 3, 4)})


def value_path(block: Callable[[torch.Tensor], torch.Tensor], feature_map: torch.Tensor) -> torch.Tensor:
    """Apply a transformer block or an attention pooling head to every location by itself.

    Attention over a single token returns its value, so this is the value path of MaskCLIP (Zhou et al., ECCV 2022): it
    gives each location an embedding of its own in the space that the tower otherwise pools into.

    Args:
        block: tokens [n, 1, C] -> [n, 1, D] or [n, D].
        feature_map: the block's input [B, C, h, w].

    Returns:
        [B, D, h, w]
    """
    batch, _, *size = feature_map.shape
    tokens = feature_map.flatten(2).mT.flatten(0, 1).unsqueeze(1)  # [B, C, h, w] -> [B*h*w, 1, C]
    embeds = torch.cat([block(chunk) for chunk in tokens.split(MAX_SEQUENCES)])
    return embeds.reshape(batch, math.prod(size), -1).mT.unflatten(2, size)  # [B*h*w, (1,) D] -> [B, D, h, w]
