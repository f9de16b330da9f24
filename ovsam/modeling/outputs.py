"""The outputs of the model and of its parts. Shapes: B images, P prompts, I instances, M mask candidates, K words,
L locations, D CLIP width, C SAM width."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class ClipFeatures(ModelOutput):
    """Image features of a CLIP side, reusable for any number of prompts and words.

    Attributes:
        maps: dense maps, high resolution first, each [B, Ci, hi, wi]; see the side's `channels` and `strides`.
        pool_map: the map that the side's `pool` reads, [B, Cp, hp, wp].
    """

    maps: tuple[torch.Tensor, ...] | None = None
    pool_map: torch.Tensor | None = None


@dataclass
class SamFeatures(ModelOutput):
    """Image features of a SAM side, reusable for any number of prompts.

    Attributes:
        embedding: input of the mask decoder, [B, C, h, w] at stride 16; `no_memory_embedding` is already added.
        high_res: finer maps that the mask decoder adds while upscaling: [B, C/8, 4h, 4w] and [B, C/4, 2h, 2w] for
            families with a pyramid (SAM 2, EdgeTAM, SAM 3's tracker), [B, C/8, 4h, 4w] for SAM-HQ, none for SAM 1 and
            EfficientTAM.
        pyramid: output maps of the vision encoder, high resolution first, each [B, Ci, hi, wi]; see the side's
            `pyramid_channels` and `pyramid_strides`. One map if there is no pyramid.
    """

    embedding: Tensor | None = None
    high_res: tuple[Tensor, ...] | None = None
    pyramid: tuple[Tensor, ...] | None = None


@dataclass
class DecodedMasks(ModelOutput):
    """Output of the mask decoder for every prompt.

    Attributes:
        masks: logits at stride 4, [B, P, M, 4h, 4w].
        iou: predicted IoU of each mask, [B, P, M].
        tokens: the decoder's output token of each mask, [B, P, M, C].
        object_logits: logits that an object is present, [B, P, 1]; None if the decoder has no object token (SAM 1,
            SAM-HQ).
    """

    masks: Tensor | None = None
    iou: Tensor | None = None
    tokens: Tensor | None = None
    object_logits: Tensor | None = None


@dataclass
class TrackedMasks(ModelOutput):
    """Masks of P objects on one frame of a video.

    Attributes:
        masks: logits at stride 4, [B, P, 4h, 4w]; the lowest value everywhere if the object is not in the image.
        iou: predicted IoU, [B, P]; 1 if the mask was given.
        object_logits: logits that the object is in the image, [B, P, 1].
        pointers: object pointers, [B, P, C].
        full: logits at the size of the model input, [B, P, H, W], for given masks only.
    """

    masks: Tensor | None = None
    iou: Tensor | None = None
    object_logits: Tensor | None = None
    pointers: Tensor | None = None
    full: Tensor | None = None


@dataclass
class ConceptOutput(ModelOutput):
    """L locations, row by row, those of the finest stride first.

    objectness [B, L] logits; boxes [B, L, 4] xyxy in pixels of the model input; embeds [B, L, D], L2-normalised;
    logit_scale, logit_shift [B, L, 1]: a word's logit is (cosine + shift) * scale (as in OWLv2); mask_features: the
    maps that the mask head reads, or None without one.
    """

    objectness: Tensor | None = None
    boxes: Tensor | None = None
    embeds: Tensor | None = None
    logit_scale: Tensor | None = None
    logit_shift: Tensor | None = None
    mask_features: tuple[Tensor, ...] | None = None


@dataclass
class OVSamFeatures(ModelOutput):
    """All that is computed from the image alone; pass it back as `features` to reuse it without encoding again.

    sam: SamFeatures; clip: ClipFeatures, or None in the `sam` composition; maps: input of the adapters, at strides 4,
    8, 16, 32; concepts: locations of the ConceptHead, in pixels of the model input, or None without one. clip_frame [B,
    4] and clip_size (height, width) map between CLIP's input and the model input where they differ.
    """

    sam: SamFeatures | None = None
    clip: ClipFeatures | None = None
    maps: tuple[Tensor, ...] | None = None
    concepts: ConceptOutput | None = None
    clip_frame: Tensor | None = None
    clip_size: tuple[int, int] | None = None


@dataclass
class OVSamOutput(ModelOutput):
    """I instances per image: the P prompts, or, without prompts, the proposals of the ConceptHead.

    pred_masks [B, I, M, H/4, W/4] logits; iou_scores [B, I, M]: IoU predicted by the mask decoder, None without
    refinement; pred_boxes [B, I, 4] xyxy in pixels of the model input; class_embeds [B, I, D], L2-normalised; logits
    [B, I, K]: logit of each text query, None without queries; negative_logits [B, I, K'] for negative queries;
    objectness [B, I] probabilities, None for prompts; scores [B, I, K] and negative_scores [B, I, K'] in [0, 1]:
    calibrated probability that the instance has the class name, by the config's name_calibration or, for proposals of
    text queries, score_calibration; the latter include the objectness; valid [B, I] bool: False for padding of the
    batch; features: the reusable OVSamFeatures.

    For post-processing: text_labels and negative_labels, as given to the processor; everything: whether instances are
    selected by objectness; score_threshold and mask_nms_threshold of the checkpoint.
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
