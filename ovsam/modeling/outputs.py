"""The outputs of the model and of its parts. Shapes: B images, P prompts, I instances, M mask candidates, K words,
L locations, D CLIP width, C SAM width, Q prototypes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class ClipFeatures(ModelOutput):
    """Image features of a CLIP side, reusable for any number of prompts and words.

    Attributes:
        maps: dense maps, high resolution first, each [B, Ci, hi, wi]; channels and strides are the side's
            `channels` and `strides`.
        pool_map: the map that the side's `pool` reads, [B, Cp, hp, wp].
    """

    maps: tuple[torch.Tensor, ...] | None = None
    pool_map: torch.Tensor | None = None


@dataclass
class SamFeatures(ModelOutput):
    """Image features of a SAM side, reusable for any number of prompts.

    Attributes:
        embedding: what the mask decoder reads, [B, C, h, w] at stride 16; `no_memory_embedding` is in it.
        high_res: what it adds while upscaling: [B, C/8, 4h, 4w] and [B, C/4, 2h, 2w] of a pyramid (SAM 2, EdgeTAM,
            SAM 3's tracker), [B, C/8, 4h, 4w] alone of SAM-HQ, nothing of SAM 1 and EfficientTAM.
        pyramid: the maps of the vision encoder as they are, high resolution first, each [B, Ci, hi, wi]; channels and
            strides are the side's `pyramid_channels` and `pyramid_strides`. One map where there is no pyramid.
    """

    embedding: Tensor | None = None
    high_res: tuple[Tensor, ...] | None = None
    pyramid: tuple[Tensor, ...] | None = None


@dataclass
class DecodedMasks(ModelOutput):
    """What the mask decoder says of every prompt.

    Attributes:
        masks: logits at stride 4, [B, P, M, 4h, 4w].
        iou: predicted IoU of each mask, [B, P, M].
        tokens: the decoder's output token of each mask, [B, P, M, C].
        object_logits: is there an object at all, [B, P, 1]; None where the decoder does not say (SAM 1, SAM-HQ).
    """

    masks: Tensor | None = None
    iou: Tensor | None = None
    tokens: Tensor | None = None
    object_logits: Tensor | None = None


@dataclass
class TrackedMasks(ModelOutput):
    """What a frame of a video shows of P objects.

    Attributes:
        masks: logits at stride 4, [B, P, 4h, 4w]; the least there is where the object is not in the picture.
        iou: predicted IoU, [B, P]; 1 where the mask was given.
        object_logits: is the object in the picture, [B, P, 1].
        pointers: object pointers, [B, P, C].
        full: logits at the size of the model input, [B, P, H, W], of given masks alone.
    """

    masks: Tensor | None = None
    iou: Tensor | None = None
    object_logits: Tensor | None = None
    pointers: Tensor | None = None
    full: Tensor | None = None


@dataclass
class ConceptOutput(ModelOutput):
    """L = H/16 * W/16 + H/32 * W/32 locations, row by row, stride 16 first.

    objectness [B, L] logits; boxes [B, L, 4] xyxy in pixels of the model input; embeds [B, L, D], L2-normalised;
    logit_scale, logit_shift [B, L, 1]: a word's logit is (cosine + shift) * scale (as in OWLv2);
    coefficients [B, L, Q] and prototypes [B, Q, H/4, W/4]: mask logits are their product.
    """

    objectness: Tensor | None = None
    boxes: Tensor | None = None
    embeds: Tensor | None = None
    logit_scale: Tensor | None = None
    logit_shift: Tensor | None = None
    coefficients: Tensor | None = None
    prototypes: Tensor | None = None


@dataclass
class OVSamFeatures(ModelOutput):
    """Everything computed from the image alone; pass it back in as `features` to ask again without encoding again.

    sam: SamFeatures; clip: ClipFeatures, or None in the `sam` composition; maps: what the adapters read, strides 4, 8,
    16, 32; concepts: the ConceptHead's locations, in pixels of the model input, or None without one. clip_frame [B, 4]
    and clip_size (height, width) say where CLIP's input lies, if it is not the model's own.
    """

    sam: SamFeatures | None = None
    clip: ClipFeatures | None = None
    maps: tuple[Tensor, ...] | None = None
    concepts: ConceptOutput | None = None
    clip_frame: Tensor | None = None
    clip_size: tuple[int, int] | None = None


@dataclass
class OVSamOutput(ModelOutput):
    """I instances per image: the P prompts, or, without prompts, what the ConceptHead proposed.

    pred_masks [B, I, M, H/4, W/4] logits; iou_scores [B, I, M], the decoder's own estimate, None without refinement;
    pred_boxes [B, I, 4] xyxy in pixels of the model input; class_embeds [B, I, D], L2-normalised;
    logits [B, I, K]: per-word logits, None without words; negative_logits [B, I, K'] for the negative words;
    objectness [B, I] probabilities, None for prompts; scores [B, I, K] and negative_scores [B, I, K']: how likely an
    instance is what the word says, in [0, 1]: the word's probability, and for a proposal of words its objectness too,
    calibrated by the config's name_calibration or, for proposals of words, score_calibration;
    valid [B, I] bool: False where a proposal only fills up a batch; features: the reusable OVSamFeatures.

    For post-processing: text_labels and negative_labels, the words as they were given to the processor; everything:
    whether instances are chosen by objectness; score_threshold and mask_nms_threshold, those of the checkpoint.
    """

    pred_masks: Tensor | None = None
    iou_scores: Tensor | None = None
    pred_boxes: Tensor | None = None
    class_embeds: Tensor | None = None
    logits: Tensor | None = None
    negative_logits: Tensor | None = None
    objectness: Tensor | None = None
    scores: Tensor | None = None
    negative_scores: Tensor | None = None
    valid: Tensor | None = None
    features: OVSamFeatures | None = None
    text_labels: Any = None
    negative_labels: list[str] | None = None
    everything: bool | None = None
    score_threshold: float | None = None
    mask_nms_threshold: float | None = None
