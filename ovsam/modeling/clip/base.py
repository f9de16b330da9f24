"""The interface of every CLIP side, and the pooling they share."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ovsam.modeling.outputs import ClipFeatures, ConceptOutput

MAX_SEQUENCES = 32768  # attention kernels on GPU launch at most 65,535 sequences at once


class ClipSide(nn.Module):
    """An image tower and a text tower that share an embedding space of width D.

    A word's logit is `(cosine + logit_shift) * logit_scale`, as in the tower's training. Where `softmax` is True
    (CLIP), only the differences between logits are calibrated: a softmax over words is meaningful, the sigmoid of one
    logit is not. Where it is False (SigLIP, OWLv2), the sigmoid of a word's logit is the probability that this word
    applies, independently of the other words.

    The class attributes below are the defaults of a family; a family overrides those in which it differs.

    Attributes:
        model_class: the transformers class whose weights the side holds under `model.`; None for other sides.
        text_padding: how text is tokenised: "longest", or "max_length" where the tower was trained on padded text
            (SigLIP).
        softmax: the loss of training: True for a softmax over texts, False for a sigmoid of each text.
        templates: the sentences that a class name is put into, as the tower was trained or evaluated with.
        settings: fields of OVSamConfig, such as thresholds, that suit the scores of the family.
        has_concepts: whether the side finds objects by itself, through `concepts(features) -> ConceptOutput` with boxes
            in pixels of its own input. It then needs no ConceptHead.
        image_processor: the configuration of the stock image processor that makes the tower's input of a whole image,
            without its size, mean and deviation.
        embed_dim: D.
        logit_scale, logit_shift: as above.
        channels, strides: of the four maps that `encode_image` returns.
        image_size, image_mean, image_std: side of the square input in pixels, and its normalisation.
        max_text_length: in tokens.
    """

    model_class: ClassVar[type[PreTrainedModel] | None] = None
    text_padding: str = "longest"
    softmax: bool = True
    templates: ClassVar[tuple[str, ...]] = ("a photo of a {}.",)
    settings: ClassVar[dict[str, Any]] = {}
    has_concepts: ClassVar[bool] = False
    # CLIP's own processor crops the centre; objects may lie anywhere, so the whole image is squashed instead.
    image_processor: ClassVar[dict[str, Any]] = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}

    embed_dim: int
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    image_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    max_text_length: int

    def encode_image(self, pixel_values: Tensor) -> ClipFeatures:
        """Return the features of images [B, 3, H, W], normalised with `image_mean` and `image_std`."""
        raise NotImplementedError

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids [K, T], T at most `max_text_length` -> [K, D], L2-normalised."""
        raise NotImplementedError

    def pool(self, features: ClipFeatures, masks: Tensor | None = None, boxes: Tensor | None = None) -> Tensor:
        """Return the class embeddings [B, P, D] of regions, L2-normalised.

        Args:
            features: of B images.
            masks: probabilities [B, P, Hm, Wm] over the whole image at any resolution.
            boxes: [B, P, 4] xyxy in pixels of the model input; one of masks and boxes is needed.
        """
        raise NotImplementedError

    def dense(self, features: ClipFeatures) -> Tensor:
        """Return the class embedding of every location, L2-normalised: [B, D, h, w], as large as `pool_map`."""
        raise NotImplementedError

    def concepts(self, features: ClipFeatures) -> ConceptOutput:
        """Return the objects that a side with `has_concepts` finds."""
        raise NotImplementedError


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
