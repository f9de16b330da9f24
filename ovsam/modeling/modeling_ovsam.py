"""OVSamModel: a SAM side, a CLIP side and the adapters between them; `forward` reads like the figure.

    image --> SAM side: vision encoder ----> SamFeatures --> prompt encoder + mask decoder --> masks, tokens
      |           (or Sam2ClipAdapter(CLIP maps))                      ^ boxes, points, masks     |
      +----> CLIP side: maps ----> ConceptHead --> locations ----------+                          v
    words -> CLIP text tower ---------^------------------------------> names <---- Clip2SamAdapter

Shapes: B images, P prompts per image, N points per prompt, I instances per image (P, or the number of proposals), M
mask candidates, K words, L locations, D CLIP width, C SAM width.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from ovsam.errors import InputError
from ovsam.modeling import check_inputs as check
from ovsam.modeling.adapters import CLIP2SAM_ADAPTERS, SAM2CLIP_ADAPTERS, ConceptHead, ConceptOutput
from ovsam.modeling.check_parts import check_fit
from ovsam.modeling.clip import CLIP_SIDES
from ovsam.modeling.configuration_ovsam import OVSamConfig
from ovsam.modeling.features import encode_image
from ovsam.modeling.geometry import boxes_from_clip, maps_to_clip
from ovsam.modeling.locations import boxed_locations
from ovsam.modeling.outputs import OVSamFeatures, OVSamOutput
from ovsam.modeling.sam import SAM_SIDES, DecodedMasks, SamFeatures
from ovsam.modeling.sam.base import Part, check_prompts
from ovsam.modeling.sam.video import EdgeTamVideoSide
from ovsam.modeling.scoring import (
    AnyNaming,
    Naming,
    TextQuery,
    clip_scale_shift,
    mean_logits,
)
from ovsam.ops.boxes import masks_to_boxes
from ovsam.ops.masks import add_prior, follow_clicks, mask_overlap, mean_masks
from ovsam.ops.nms import fast_box_nms, suppress
from ovsam.ops.scores import calibrated, instance_scores


class OVSamPreTrainedModel(PreTrainedModel):
    config: OVSamConfig
    base_model_prefix = "ovsam"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: list[str] = []

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the weights that a checkpoint lacks in modules that are not models of their own, such as those of
        timm. Everything left out here stays uninitialised memory, buffers that are not saved included."""
        for parameter in module.parameters(recurse=False):
            init.normal_(parameter, std=0.02)
        super()._init_weights(module)
        if hasattr(module, "init_non_persistent_buffers"):  # a convention of timm
            module.init_non_persistent_buffers()

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Remote code is one shim file beside the weights (see hub/); transformers must not copy our sources."""


# Pattern of the weight names that exist in trackers only.
MEMORY_WEIGHTS = rf"^sam\.model\.({'|'.join(EdgeTamVideoSide.memory_parts)})"


def _sam_part(config: OVSamConfig, part: Part) -> nn.Module:
    return SAM_SIDES[config.sam_config.model_type](config.sam_config, part=part)


class OVSamVisionModel(OVSamPreTrainedModel):
    """Image -> OVSamFeatures, without concepts. Loads from the folder of the whole model; module paths are the same."""

    _keys_to_ignore_on_load_unexpected = [
        r"^clip\.(model\.)?(owlv2\.)?(text|logit)",
        r"^(clip2sam|concepts)\.",
        r"^sam\.model\.(prompt_encoder|shared_image_embedding|mask_decoder)\.",
        MEMORY_WEIGHTS,
    ]

    def __init__(self, config: OVSamConfig):
        super().__init__(config)
        # Only the encoders that the composition uses are built.
        self.sam = _sam_part(config, "vision") if config.composition != "clip" else None
        self.clip = _clip_part(config, "vision") if config.composition != "sam" else None
        self.sam2clip = _sam2clip(config) if config.composition == "clip" else None
        self.post_init()

    def forward(
        self, pixel_values: Tensor, clip_pixel_values: Tensor | None = None, clip_window: Tensor | None = None
    ) -> OVSamFeatures:
        """pixel_values [B, 3, H, W]; clip_pixel_values and clip_window only if CLIP resizes or pads images
        differently."""
        check.tensors(pixel_values=pixel_values, clip_pixel_values=clip_pixel_values, clip_window=clip_window)
        return encode_image(self, pixel_values, clip_pixel_values, clip_window)


class OVSamMaskDecoder(OVSamPreTrainedModel):
    """Features and prompts -> masks: prompt encoder and mask decoder. Loads from the folder of the whole model."""

    main_input_name = "input_boxes"
    _keys_to_ignore_on_load_unexpected = [
        r"^(clip|clip2sam|concepts|sam2clip)\.",
        r"^sam\.model\.(vision_encoder|no_memory_embedding)",
        MEMORY_WEIGHTS,
    ]

    def __init__(self, config: OVSamConfig):
        super().__init__(config)
        self.sam = _sam_part(config, "decoder")
        self.post_init()

    def forward(self, features: SamFeatures, multimask_output: bool = False, **prompts: Tensor | None) -> DecodedMasks:
        """prompts: input_points, input_labels, input_boxes, input_masks, as in OVSamModel."""
        return self.sam.select_masks(self.sam.decode(features, **prompts), multimask_output)


def _clip_part(config: OVSamConfig, part: Literal["all", "vision", "text"]) -> nn.Module:
    return CLIP_SIDES[config.clip_config.model_type](config.clip_config, part=part)


def _sam2clip(config: OVSamConfig) -> nn.Module:
    return SAM2CLIP_ADAPTERS[config.sam2clip_config.model_type](config.sam2clip_config)


def _clip2sam(config: OVSamConfig) -> nn.Module:
    return CLIP2SAM_ADAPTERS[config.clip2sam_config.model_type](config.clip2sam_config)


class OVSamModel(OVSamPreTrainedModel):
    """The whole model. One call answers three questions: prompts (what is this?), text queries (where is it?), neither
    (what is here?)."""

    def __init__(self, config: OVSamConfig):
        super().__init__(config)
        composition = config.composition
        self.sam = _sam_part(config, "tracker" if composition == "clip" else "all")
        self.clip = _clip_part(config, "text" if composition == "sam" else "all")
        self.sam2clip = _sam2clip(config) if composition == "clip" else None
        self.clip2sam = _clip2sam(config) if config.clip2sam_config else None
        self.concepts = ConceptHead(config.concepts_config) if config.concepts_config else None
        check_fit(self)
        self.post_init()

    # ---- the two encoders -------------------------------------------------------------------------------------

    def encode(
        self,
        pixel_values: Tensor,
        clip_pixel_values: Tensor | None = None,
        clip_window: Tensor | None = None,
        *,
        concepts: bool = True,
    ) -> OVSamFeatures:
        """pixel_values [B, 3, H, W] -> all features that depend on the image alone. Without `concepts`, those of the
        ConceptHead are computed when the model is first called with the features: most frames of a video need none."""
        check.tensors(pixel_values=pixel_values, clip_pixel_values=clip_pixel_values, clip_window=clip_window)
        features = encode_image(self, pixel_values, clip_pixel_values, clip_window)
        if concepts:
            self.complete(features)
        return features

    def complete(self, features: OVSamFeatures) -> None:
        """Add what `encode` without `concepts` left out."""
        if features.concepts is not None or not (features.maps or features.clip is not None):
            return  # it is there, or the features are those of the SAM side alone
        if self.concepts is not None:
            features.concepts = self.concepts(features.maps)
        elif features.clip is not None and self.clip.has_concepts:
            features.concepts = self.clip.concepts(features.clip)
        if features.concepts is not None:
            self._move_from_clip(features)

    def get_image_embeddings(self, pixel_values: Tensor) -> list[Tensor]:
        """Return maps at strides 4, 8 and 16, as the method of this name in SAM 2 does. They are passed back in as
        `image_embeddings` for masks without class names, as the mask-generation pipeline of transformers does."""
        check.tensors(pixel_values=pixel_values)
        sam = encode_image(self, pixel_values).sam
        return [*sam.high_res, sam.embedding]

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids [K, T] -> [K, D], L2-normalised."""
        check.tensors(input_ids=input_ids, attention_mask=attention_mask)
        return self.clip.encode_text(input_ids, attention_mask)

    # ---- the figure -------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        *,
        pixel_values: Tensor | None = None,
        clip_pixel_values: Tensor | None = None,
        clip_window: Tensor | None = None,
        features: OVSamFeatures | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        text_embeds: Tensor | None = None,
        text_labels: Sequence | Mapping[str, str] | None = None,
        negative_labels: list[str] | None = None,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        input_boxes: Tensor | None = None,
        input_masks: Tensor | None = None,
        image_embeddings: list[Tensor] | None = None,
        multimask_output: bool = False,
        everything: bool = False,
        refine: bool | None = None,
        proposal_threshold: float | None = None,
        prompt_counts: Tensor | list[int] | None = None,
        original_sizes: Tensor | None = None,
    ) -> OVSamOutput:
        """
        Args:
            pixel_values: images [B, 3, H, W]; or `features` of an earlier call; or, for masks without class names,
                `image_embeddings` from get_image_embeddings().
            clip_pixel_values: images [B, 3, H', W'], if CLIP resizes or pads them differently; clip_window [B, 4] is
                the rectangle they cover, x1, y1, x2, y2 in fractions of the model input (default: all of it).
            input_ids, attention_mask: token ids [K + K', T] of the text queries, the K' negative ones last; or
                `text_embeds` [K + K', D], L2-normalised.
            text_labels: text queries as strings, as the processor returns them: one list for all images, or one list
                for each image (queries of other images then get the lowest logit); or, with `text_embeds`, the class
                names of its rows. They are returned in the output for post-processing; scoring rules that distinguish
                trained class names read them too.
            negative_labels: negative queries as strings; their number divides the rows above.
            input_points: points [B, P, N, 2] xy in pixels of the model input; input_labels [B, P, N]: 1 inside, 0
                outside, -10 padding.
            input_boxes: boxes [B, P, 4] xyxy in pixels of the model input.
            input_masks: mask logits [B, P, H/4, W/4].
            multimask_output: whether to return three masks for each prompt instead of the best one.
            everything: whether to propose all objects and use the text queries only to classify them; always so without
                text queries.
            refine: whether to refine masks with the mask decoder (default: `refine_boxes` of the config); if False,
                `input_masks` or else the masks of the ConceptHead are returned unchanged. Three masks of a prompt
                always come from the decoder.
            proposal_threshold: lowest score of the proposals that are refined (default: the one of the config).
            prompt_counts: number of prompts of each image; the rest of P is padding.
            original_sizes: ignored; part of the processor's output, so that `model(**inputs)` works.

        Raises:
            InputError: neither pixels nor features are given; an argument is no tensor of its form; or no prompts are
                given and the model has no ConceptHead.
        """
        prompts = {
            "input_points": input_points,
            "input_labels": input_labels,
            "input_boxes": input_boxes,
            "input_masks": input_masks,
        }
        check.weights(self)
        check.tensors(**prompts, input_ids=input_ids, attention_mask=attention_mask, text_embeds=text_embeds)
        check.labels(text_labels=text_labels, negative_labels=negative_labels)
        check.options(features, image_embeddings, prompt_counts, proposal_threshold)
        if features is None and image_embeddings is not None:
            *high_res, embedding = image_embeddings
            # A ModelOutput whose only argument is a dictionary would take it for its fields, hence maps=().
            features = OVSamFeatures(sam=SamFeatures(embedding=embedding, high_res=tuple(high_res)), maps=())
        if features is None and pixel_values is None:
            raise InputError("Pass pixel_values, or features of an earlier call to encode().")
        if features is None:
            features = self.encode(pixel_values, clip_pixel_values, clip_window)
        self.complete(features)
        if text_embeds is None and input_ids is not None:
            text_embeds = self.get_text_features(input_ids, attention_mask)
        query = TextQuery.of(text_embeds, text_labels, negative_labels)

        if input_points is not None and input_labels is None:
            labels = torch.ones(input_points.shape[:3], dtype=torch.long, device=input_points.device)
            prompts["input_labels"] = labels
        if any(prompt is not None for prompt in prompts.values()):
            output = self._what(features, prompts, query, multimask_output, refine)
            if prompt_counts is not None:
                counts = torch.as_tensor(prompt_counts, device=output.valid.device)
                output.valid &= torch.arange(output.valid.shape[1], device=counts.device) < counts[:, None]
        else:
            everything = everything or query.embeds is None
            output = self._where(features, query, everything, refine, proposal_threshold)
        output.text_labels, output.negative_labels = text_labels, negative_labels
        output.everything, output.mask_nms_threshold = everything, self.config.mask_nms_threshold
        output.score_threshold = self.config.objectness_threshold if everything else self.config.score_threshold
        return output

    def _what(
        self, features: OVSamFeatures, prompts: dict, query: TextQuery, multimask_output: bool, refine: bool | None
    ) -> OVSamOutput:
        """Prompts -> masks and their class embeddings."""
        prior = None if multimask_output else self._prior(features, prompts)  # [B, P, H, W], None without one
        rough = prompts["input_masks"] if prior is None else prior
        if rough is None and refine is False:
            raise InputError(
                "refine=False keeps masks as they are: pass input_masks, or refine boxes and points, since this "
                "model has no ConceptHead with masks."
            )
        if refine is None:
            boxed = prompts["input_masks"] is None and prompts["input_points"] is None
            refine = self.config.refine_boxes or rough is None or not boxed
        decoded = DecodedMasks()
        if refine or self._reads_tokens:
            given = prompts if prior is None else prompts | {"input_masks": prior}
            decoded = self.sam.select_masks(self.sam.decode(features.sam, **given), multimask_output)
        if not refine:  # only the tokens of the decoder are used, for classification
            decoded.masks, decoded.iou = rough[:, :, None], None
        elif prior is not None:
            decoded.masks = add_prior(decoded.masks, prior, self.config.mask_head_weight)
            if prompts["input_points"] is not None:
                clicks = prompts["input_points"] / self._mask_stride(decoded.masks)
                decoded.masks = follow_clicks(decoded.masks[:, :, 0], clicks, prompts["input_labels"])[:, :, None]
        score = decoded.masks.new_zeros(decoded.masks.shape[:3]) if decoded.iou is None else decoded.iou
        best = score.argmax(-1, keepdim=True)  # [B, P, 1]; the mask that is classified
        masks, tokens = decoded.masks.take_along_dim(best[..., None, None], 2)[:, :, 0], None  # [B, P, H/4, W/4]
        if decoded.tokens is not None:
            tokens = decoded.tokens.take_along_dim(best[..., None], 2)[:, :, 0]  # [B, P, C]
        boxes = masks_to_boxes(masks > 0) * self._mask_stride(masks)
        # Prefer the user's box over the box of the predicted mask.
        region = boxes if prompts["input_boxes"] is None else prompts["input_boxes"].float()
        naming = self._name(features, masks, region, tokens)
        logits, negative_logits = naming.logits(query.embeds, query.mask, query.labels), naming.logits(query.negatives)
        return OVSamOutput(
            pred_masks=decoded.masks,
            iou_scores=decoded.iou,
            pred_boxes=boxes,
            class_embeds=naming.embeds,
            logits=logits,
            negative_logits=negative_logits,
            scores=_score(logits, None, 0.0, self.config.name_calibration),
            negative_scores=_score(negative_logits, None, 0.0, self.config.name_calibration),
            valid=torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device),
            features=features,
        )

    def _where(
        self,
        features: OVSamFeatures,
        query: TextQuery,
        everything: bool,
        refine: bool | None,
        proposal_threshold: float | None,
    ) -> OVSamOutput:
        """Text queries, or none -> locations of the ConceptHead -> instances."""
        concepts = features.concepts
        if concepts is None:
            raise InputError(
                "This model has no ConceptHead, so it cannot search for text queries or everything: pass points, "
                "boxes or masks, or a model with one, such as ovsam-tiny."
            )
        if refine is False and concepts.mask_features is None:
            raise InputError("refine=False needs masks of the ConceptHead, which this model does not have.")
        threshold = self.config.proposal_threshold if proposal_threshold is None else proposal_threshold
        index, valid = self._propose(features, None if everything else query, threshold)  # [B, I]
        boxes = concepts.boxes.take_along_dim(index[..., None], 1)  # [B, I, 4]
        masks, iou, tokens = self._box_masks(features, boxes), None, None
        if masks is not None:
            kept, valid = self._distinct(masks, valid)
            index, boxes = index.gather(1, kept), boxes.take_along_dim(kept[..., None], 1)
            masks = masks.take_along_dim(kept[..., None, None], 1)
        objectness = concepts.objectness.gather(1, index).float().sigmoid()
        if refine is None:
            refine = self.config.refine_boxes or masks is None
        if refine and index.shape[1]:
            decoded = self.sam.decode(features.sam, input_boxes=boxes, input_masks=masks)
            decoded = self.sam.select_masks(decoded, multimask_output=False)
            refined, iou, tokens = decoded.masks, decoded.iou, decoded.tokens[:, :, 0]
            refined = refined if masks is None else add_prior(refined, masks, self.config.mask_head_weight)
            masks = refined[:, :, 0]
        elif masks is None:  # no proposals, and no mask head that gives the size of the masks
            masks = boxes.new_zeros(*index.shape, *(4 * side for side in features.sam.embedding.shape[-2:]))
        namings: list[AnyNaming] = [self._concept_naming(concepts, index)]
        if self.clip2sam is not None and (tokens is not None or not self._reads_tokens):
            # The adapter replaces the head's logits in everything mode; else both are averaged.
            region = masks_to_boxes(masks > 0) * self._mask_stride(masks)
            seen = self._name(features, masks, region, tokens)
            namings = [seen] if everything else [*namings, seen]
        logits = mean_logits(namings, query.embeds, query.mask, query.labels)
        negative_logits = mean_logits(namings, query.negatives)
        config = self.config
        weight = 0.0 if everything else config.objectness_weight
        calibration = config.name_calibration if everything else config.score_calibration
        return OVSamOutput(
            pred_masks=masks[:, :, None],
            iou_scores=iou,
            pred_boxes=boxes,
            class_embeds=namings[-1].embeds,
            logits=logits,
            negative_logits=negative_logits,
            objectness=objectness,
            scores=_score(logits, objectness, weight, calibration),
            negative_scores=_score(negative_logits, objectness, weight, calibration),
            valid=valid,
            features=features,
        )

    # ---- its steps --------------------------------------------------------------------------------------------

    def _propose(self, features: OVSamFeatures, query: TextQuery | None, threshold: float) -> tuple[Tensor, Tensor]:
        """Select the locations that become instances: highest score first, duplicates removed.

        Returns:
            index [B, I] into the locations and valid [B, I]; I is the highest number of proposals of an image.
        """
        concepts, config = features.concepts, self.config
        objectness, top = self.likely_locations(concepts)  # [B, 300]
        score = objectness
        if query is not None:
            logits = self._concept_naming(concepts, top).best_logit(query.embeds, query.mask)
            score = instance_scores(logits.float(), objectness, config.objectness_weight)
            score = calibrated(score, config.score_calibration)
        score, order = score.sort(dim=1, descending=True)
        top = top.gather(1, order)
        kept = []
        for image in range(len(top)):  # images have different numbers of instances
            index = top[image][score[image] > threshold]
            index = index[fast_box_nms(concepts.boxes[image, index], config.nms_threshold)][: config.max_detections]
            kept.append(index)
        index = nn.utils.rnn.pad_sequence(kept, batch_first=True, padding_value=-1)
        return index.clamp(min=0), index >= 0

    def _distinct(self, masks: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Remove duplicates by mask, so that each object is refined once.

        Args:
            masks: logits [B, I, h, w], the highest score first.
            valid: [B, I].

        Returns:
            index [B, I'] of the instances that are kept, and their valid [B, I'].
        """
        kept = [
            mine.nonzero()[:, 0][suppress(mask_overlap(rough[mine] > 0), self.config.mask_nms_threshold)]
            for rough, mine in zip(masks, valid, strict=True)
        ]
        index = nn.utils.rnn.pad_sequence(kept, batch_first=True, padding_value=-1)
        return index.clamp(min=0), index >= 0

    def likely_locations(self, concepts: ConceptOutput) -> tuple[Tensor, Tensor]:
        """The `max_locations` locations of highest objectness: as probabilities [B, T], and their indices [B, T]."""
        count = min(self.config.max_locations or concepts.objectness.shape[1], concepts.objectness.shape[1])
        return concepts.objectness.float().sigmoid().topk(count, dim=1)

    def _move_from_clip(self, features: OVSamFeatures) -> None:
        """Map boxes from CLIP's input to the model input, and clip them to it."""
        concepts = features.concepts
        concepts.boxes = boxes_from_clip(concepts.boxes, features.clip_frame).clamp(0, self.sam.image_size)

    def _box_masks(self, features: OVSamFeatures, boxes: Tensor) -> Tensor | None:
        """boxes [B, I, 4] -> mask logits [B, I, h, w] of the ConceptHead, None without one."""
        if self.concepts is None or features.concepts is None:
            return None
        return self.concepts.box_masks(features.concepts, boxes, self.sam.image_size, features.clip_frame)

    def _prior(self, features: OVSamFeatures, prompts: dict) -> Tensor | None:
        """The masks [B, P, H, W] that the mask decoder corrects: those of the ConceptHead for boxes or clicks, or the
        mask prompts, or for clicks with mask prompts the mean of both. None without a mask head or if its weight is
        0."""
        concepts, boxes, points = features.concepts, prompts["input_boxes"], prompts["input_points"]
        if self.concepts is None or concepts is None or not self.config.mask_head_weight:
            return None
        check_prompts(len(concepts.boxes), *prompts.values())
        given = prompts["input_masks"]
        if given is not None and (points is None or boxes is not None):
            return given
        if boxes is not None:
            return self._box_masks(features, boxes)
        labels = prompts["input_labels"]
        masks, agreed = self.concepts.point_masks(concepts, points, labels, self.sam.image_size, features.clip_frame)
        return masks if given is None else mean_masks(given, masks, agreed)

    def _name(self, features: OVSamFeatures, masks: Tensor, boxes: Tensor, tokens: Tensor | None) -> AnyNaming:
        """Class embedding of each mask: from the adapter, else from the best-matching locations, else from CLIP's own
        pooling; none if all features come from SAM."""
        if self.clip2sam is not None and features.maps:
            quarter = [round(self.sam.image_size / 4)] * 2  # stride 4
            masks = masks if list(masks.shape[-2:]) == quarter else F.adaptive_avg_pool2d(masks, quarter)
            return self.clip2sam.name(features, masks, boxes, tokens, self.clip)
        if features.concepts is not None:
            concepts = features.concepts
            return self._concept_naming(concepts, boxed_locations(concepts, boxes, trust=1.0))
        if features.clip is not None:
            seen = maps_to_clip(masks.sigmoid(), features.clip_frame, self.sam.image_size, features.clip_size)
            embeds = self.clip.pool(features.clip, masks=seen)
            return Naming(embeds, *clip_scale_shift(self.clip))
        return Naming(None, None, None)

    @property
    def _reads_tokens(self) -> bool:
        """Whether masks are classified by the tokens of the mask decoder."""
        return self.clip2sam is not None and self.clip2sam.reads_tokens

    def _concept_naming(self, concepts: ConceptOutput, index: Tensor) -> "Naming":
        """Class embeddings of the locations at index [B, I], each with its own scale and shift."""
        parts = (concepts.embeds, concepts.logit_scale, concepts.logit_shift)
        return Naming(*(part.take_along_dim(index[..., None], 1) for part in parts))

    def _mask_stride(self, masks: Tensor) -> float:
        return self.sam.image_size / masks.shape[-1]


def _score(
    logits: Tensor | None, objectness: Tensor | None, weight: float, calibration: Sequence[float]
) -> Tensor | None:
    """logits [B, I, K], objectness [B, I] -> [B, I, K]"""
    if logits is None:
        return None
    things = None if objectness is None else objectness[..., None]
    return calibrated(instance_scores(logits.float(), things, weight), calibration)
