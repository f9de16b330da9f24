"""OVSamModel: a SAM side, a CLIP side and the adapters between them; `forward` reads like the figure.

    image --> SAM side: vision encoder ----> SamFeatures --> prompt encoder + mask decoder --> masks, tokens
      |           (or Sam2ClipAdapter(CLIP maps))                      ^ boxes, points, masks     |
      +----> CLIP side: maps ----> ConceptHead --> locations ----------+                          v
    words -> CLIP text tower ---------^------------------------------> names <---- Clip2SamAdapter

Shapes: B images, P prompts per image, N points per prompt, I instances per image (P, or what was proposed), M mask
candidates, K words, L locations, D CLIP width, C SAM width, Q prototypes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from ovsam.adapters.clip2sam import Clip2SamAdapter
from ovsam.adapters.concepts import ConceptHead, ConceptOutput
from ovsam.adapters.sam2clip import Sam2ClipAdapter
from ovsam.boxes import masks_to_boxes
from ovsam.clip import CLIP_SIDES, ClipFeatures
from ovsam.configuration_ovsam import OVSamConfig
from ovsam.errors import InputError
from ovsam.nms import fast_box_nms
from ovsam.sam import SAM_SIDES, DecodedMasks, SamFeatures


@dataclass
class OVSamFeatures(ModelOutput):
    """Everything computed from the image alone; pass it back in as `features` to ask again without encoding again.

    sam: SamFeatures; clip: ClipFeatures, or None in the `sam` composition; maps: what the adapters read, strides 4, 8,
    16, 32; concepts: the ConceptHead's locations, or None without one.
    """

    sam: SamFeatures | None = None
    clip: ClipFeatures | None = None
    maps: tuple[Tensor, ...] | None = None
    concepts: ConceptOutput | None = None


@dataclass
class OVSamOutput(ModelOutput):
    """I instances per image: the P prompts, or, without prompts, what the ConceptHead proposed.

    pred_masks [B, I, M, H/4, W/4] logits; iou_scores [B, I, M], the decoder's own estimate, None without refinement;
    pred_boxes [B, I, 4] xyxy in pixels of the model input; class_embeds [B, I, D], L2-normalised;
    logits [B, I, K]: per-word logits, None without words; negative_logits [B, I, K'] for the negative words;
    objectness [B, I] probabilities, None for prompts; valid [B, I] bool: False where a proposal only fills up a batch;
    features: the reusable OVSamFeatures.
    """

    pred_masks: Tensor | None = None
    iou_scores: Tensor | None = None
    pred_boxes: Tensor | None = None
    class_embeds: Tensor | None = None
    logits: Tensor | None = None
    negative_logits: Tensor | None = None
    objectness: Tensor | None = None
    valid: Tensor | None = None
    features: OVSamFeatures | None = None


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
        """Fills what a checkpoint lacks of the modules that belong to no model of their own, such as timm's: whatever
        is passed over here stays uninitialised memory, also buffers that are not saved."""
        for parameter in module.parameters(recurse=False):
            init.normal_(parameter, std=0.02)
        super()._init_weights(module)
        if hasattr(module, "init_non_persistent_buffers"):  # a convention of timm
            module.init_non_persistent_buffers()

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Remote code is one shim file beside the weights (see hub/); transformers must not copy our sources."""


def _sam_part(config: OVSamConfig, part: Literal["all", "vision", "decoder"]) -> nn.Module:
    return SAM_SIDES[config.sam_config.model_type](config.sam_config, part=part)


class OVSamVisionModel(OVSamPreTrainedModel):
    """Image -> OVSamFeatures, without concepts. Loads from the whole model's folder; module paths are the whole's."""

    _keys_to_ignore_on_load_unexpected = [
        r"^clip\.(model\.)?(text|logit)",
        r"^(clip2sam|concepts)\.",
        r"^sam\.model\.(prompt_encoder|shared_image_embedding|mask_decoder)\.",
    ]

    def __init__(self, config: OVSamConfig):
        super().__init__(config)
        # Each composition has only the encoders it uses.
        self.sam = _sam_part(config, "vision") if config.composition != "clip" else None
        self.clip = _clip_part(config, "vision") if config.composition != "sam" else None
        self.sam2clip = Sam2ClipAdapter(config.sam2clip_config) if config.composition == "clip" else None
        self.post_init()

    def forward(self, pixel_values: Tensor, clip_pixel_values: Tensor | None = None) -> OVSamFeatures:
        """pixel_values [B, 3, H, W]; clip_pixel_values only where CLIP has a geometry of its own."""
        return encode_image(self, pixel_values, clip_pixel_values)


class OVSamMaskDecoder(OVSamPreTrainedModel):
    """Features and prompts -> masks: prompt encoder and mask decoder. Loads from the whole model's folder."""

    main_input_name = "input_boxes"
    _keys_to_ignore_on_load_unexpected = [
        r"^(clip|clip2sam|concepts|sam2clip)\.",
        r"^sam\.model\.(vision_encoder|no_memory_embedding)",
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


def encode_image(model, pixel_values: Tensor, clip_pixel_values: Tensor | None = None) -> OVSamFeatures:
    """The image side of the figure, for the whole model and for its vision part alone."""
    pixel_values = pixel_values.to(model.dtype)
    clip_pixel_values = pixel_values if clip_pixel_values is None else clip_pixel_values.to(model.dtype)
    if model.config.composition == "sam":
        sam = model.sam.encode(pixel_values)
        # SAM's pyramid ends at stride 16; the adapters' fourth map is its stride-16 map, halved.
        maps = (*sam.pyramid, F.avg_pool2d(sam.pyramid[-1], 2))
        return OVSamFeatures(sam=sam, maps=maps)
    clip = model.clip.encode_image(clip_pixel_values)
    sam = model.sam2clip(clip.maps) if model.config.composition == "clip" else model.sam.encode(pixel_values)
    return OVSamFeatures(sam=sam, clip=clip, maps=clip.maps)


class OVSamModel(OVSamPreTrainedModel):
    """The whole. Three questions, one call: prompts (what is this?), words (where is it?), neither (what is here?)."""

    def __init__(self, config: OVSamConfig):
        super().__init__(config)
        composition = config.composition
        self.sam = _sam_part(config, "decoder" if composition == "clip" else "all")
        self.clip = _clip_part(config, "text" if composition == "sam" else "all")
        self.sam2clip = Sam2ClipAdapter(config.sam2clip_config) if composition == "clip" else None
        self.clip2sam = Clip2SamAdapter(config.clip2sam_config) if config.clip2sam_config else None
        self.concepts = ConceptHead(config.concepts_config) if config.concepts_config else None
        self.post_init()

    # ---- the two encoders -------------------------------------------------------------------------------------

    def encode(self, pixel_values: Tensor, clip_pixel_values: Tensor | None = None) -> OVSamFeatures:
        """pixel_values [B, 3, H, W] -> everything that depends on the image alone."""
        features = encode_image(self, pixel_values, clip_pixel_values)
        if self.concepts is not None:
            features.concepts = self.concepts(features.maps)
        return features

    def get_image_embeddings(self, pixel_values: Tensor) -> list[Tensor]:
        """What SAM 2's own method of this name gives, maps at strides 4, 8 and 16, to be passed back in as
        `image_embeddings` for masks without names. transformers' mask-generation pipeline works that way."""
        sam = encode_image(self, pixel_values).sam
        return [*sam.high_res, sam.embedding]

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids [K, T] -> [K, D], L2-normalised."""
        return self.clip.encode_text(input_ids, attention_mask)

    # ---- the figure -------------------------------------------------------------------------------------------

    def forward(
        self,
        pixel_values: Tensor | None = None,
        clip_pixel_values: Tensor | None = None,
        features: OVSamFeatures | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        negative_input_ids: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
        negative_embeds: Tensor | None = None,
        text_labels: list | None = None,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        input_boxes: Tensor | None = None,
        input_masks: Tensor | None = None,
        image_embeddings: list[Tensor] | None = None,
        multimask_output: bool = False,
        everything: bool = False,
        refine: bool = True,
        proposal_threshold: float | None = None,
        **kwargs,
    ) -> OVSamOutput:
        """
        Args:
            pixel_values: [B, 3, H, W]; or `features` of an earlier call; or, for masks without names,
                `image_embeddings` from get_image_embeddings().
            clip_pixel_values: [B, 3, H', W'], where CLIP has a geometry of its own.
            input_ids, attention_mask: the words [K, T]; or `text_embeds` [K, D], L2-normalised.
            text_mask: [B, K] bool, which words each image is asked about, where that differs. Other words' logits are
                the least there is.
            negative_input_ids, negative_attention_mask, negative_embeds: words to be told apart from, likewise.
            text_labels: the words as strings; ride along for post-processing, unused here.
            input_points: [B, P, N, 2] xy in pixels of the model input; input_labels [B, P, N]: 1 inside, 0 outside, -10
                padding.
            input_boxes: [B, P, 4] xyxy in pixels of the model input.
            input_masks: [B, P, H/4, W/4] logits.
            multimask_output: three masks for each prompt instead of the best one.
            everything: propose whatever is an object, and let the words only name it; without words that is so anyway.
            refine: False keeps the ConceptHead's prototype masks as they are.
            proposal_threshold: proposals below it are dropped before refinement (default: the config's).

        Raises:
            InputError: neither pixels nor features; or no prompts and no ConceptHead.
        """
        if features is None and image_embeddings is not None:
            *high_res, embedding = image_embeddings
            # A ModelOutput given nothing but a dictionary takes that for its fields; maps=() is something.
            features = OVSamFeatures(sam=SamFeatures(embedding=embedding, high_res=tuple(high_res)), maps=())
        if features is None and pixel_values is None:
            raise InputError("Pass pixel_values, or features of an earlier call to encode().")
        if features is None:
            features = self.encode(pixel_values, clip_pixel_values)
        if text_embeds is None and input_ids is not None:
            text_embeds = self.get_text_features(input_ids, attention_mask)
        if negative_embeds is None and negative_input_ids is not None:
            negative_embeds = self.get_text_features(negative_input_ids, negative_attention_mask)

        prompts = {
            "input_points": input_points,
            "input_labels": input_labels,
            "input_boxes": input_boxes,
            "input_masks": input_masks,
        }
        if any(prompt is not None for prompt in prompts.values()):
            return self._what(features, prompts, text_embeds, text_mask, negative_embeds, multimask_output)
        return self._where(features, text_embeds, text_mask, negative_embeds, everything, refine, proposal_threshold)

    def _what(self, features, prompts, text_embeds, text_mask, negative_embeds, multimask_output) -> OVSamOutput:
        """Prompts -> masks and their class embeddings."""
        decoded = self.sam.select_masks(self.sam.decode(features.sam, **prompts), multimask_output)
        best = decoded.iou.argmax(-1, keepdim=True)  # [B, P, 1]; the mask that is named
        masks = decoded.masks.take_along_dim(best[..., None, None], 2)[:, :, 0]  # [B, P, H/4, W/4]
        tokens = decoded.tokens.take_along_dim(best[..., None], 2)[:, :, 0]  # [B, P, C]
        boxes = masks_to_boxes(masks > 0) * self._mask_stride(masks)
        # A person's box says better where the thing is than the box of the predicted mask.
        region = boxes if prompts["input_boxes"] is None else prompts["input_boxes"].float()
        naming = self._name(features, masks, region, tokens)
        return OVSamOutput(
            pred_masks=decoded.masks,
            iou_scores=decoded.iou,
            pred_boxes=boxes,
            class_embeds=naming.embeds,
            logits=naming.logits(text_embeds, text_mask),
            negative_logits=naming.logits(negative_embeds),
            valid=torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device),
            features=features,
        )

    def _where(
        self, features, text_embeds, text_mask, negative_embeds, everything, refine, proposal_threshold
    ) -> OVSamOutput:
        """Words, or nothing -> the ConceptHead's locations -> instances."""
        concepts = features.concepts
        if concepts is None:
            raise InputError(
                "This model has no ConceptHead, so it cannot find words or everything by itself: pass points, boxes or "
                "masks, or a model with one, such as ovsam-tiny."
            )
        if not refine and concepts.prototypes is None:
            raise InputError("refine=False needs prototype masks, which this model's ConceptHead does not give.")
        threshold = self.config.proposal_threshold if proposal_threshold is None else proposal_threshold
        index, valid = self._propose(concepts, None if everything else text_embeds, text_mask, threshold)  # [B, I]
        boxes = _take(concepts.boxes, index)  # [B, I, 4]
        masks = torch.einsum("biq,bqhw->bihw", _take(concepts.coefficients, index), concepts.prototypes)
        masks = crop(masks, boxes / self._mask_stride(masks))
        iou, tokens = None, None
        if refine and index.shape[1]:
            decoded = self.sam.decode(features.sam, input_boxes=boxes, input_masks=masks)
            decoded = self.sam.select_masks(decoded, multimask_output=False)
            masks, iou, tokens = decoded.masks[:, :, 0], decoded.iou, decoded.tokens[:, :, 0]
        namings = [self._concept_naming(concepts, index)]
        if self.clip2sam is not None and tokens is not None:
            # The adapter has seen the refined mask: it names everything, and has half a say on words.
            region = masks_to_boxes(masks > 0) * self._mask_stride(masks)
            seen = self._name(features, masks, region, tokens)
            namings = [seen] if everything else [*namings, seen]
        return OVSamOutput(
            pred_masks=masks[:, :, None],
            iou_scores=iou,
            pred_boxes=boxes,
            class_embeds=namings[-1].embeds,
            logits=mean_logits(namings, text_embeds, text_mask),
            negative_logits=mean_logits(namings, negative_embeds),
            objectness=concepts.objectness.gather(1, index).sigmoid(),
            valid=valid,
            features=features,
        )

    # ---- its steps --------------------------------------------------------------------------------------------

    def _propose(
        self, concepts: ConceptOutput, words: Tensor | None, text_mask: Tensor | None, threshold: float
    ) -> tuple[Tensor, Tensor]:
        """Which locations become instances: the most object-like, those that a word fits, less their duplicates.

        Returns index [B, I] into the locations, best first, and valid [B, I]; I is the most any image has.
        """
        count = min(self.config.max_locations, concepts.objectness.shape[1])
        objectness, top = concepts.objectness.sigmoid().topk(count, dim=1)  # [B, 300]
        score = objectness
        if words is not None:
            score = instance_scores(self._concept_naming(concepts, top).best_logit(words, text_mask), objectness)
        score, order = score.sort(dim=1, descending=True)
        top = top.gather(1, order)
        kept = []
        for image in range(len(top)):  # images differ in how many instances they hold
            index = top[image][score[image] > threshold]
            index = index[fast_box_nms(concepts.boxes[image, index], self.config.nms_threshold)]
            kept.append(index[: self.config.max_detections])
        index = nn.utils.rnn.pad_sequence(kept, batch_first=True, padding_value=-1)
        return index.clamp(min=0), index >= 0

    def _name(self, features: OVSamFeatures, masks: Tensor, boxes: Tensor, tokens: Tensor) -> "Naming":
        """The class embedding of each mask: the adapter's, else the best-matching locations', else CLIP's own; none
        where the features are SAM's alone."""
        if self.clip2sam is not None and features.maps:
            embeds = self.clip2sam(features.maps, boxes, masks.sigmoid(), tokens)
            return Naming(embeds, self.clip2sam.log_scale.exp(), self.clip2sam.logit_shift)
        if features.concepts is not None:
            concepts = features.concepts
            overlap = torch.stack([box_iou(b, c) for b, c in zip(boxes, concepts.boxes, strict=True)])  # [B, P, L]
            best = (overlap * concepts.objectness.sigmoid()[:, None]).argmax(-1)  # [B, P]
            return self._concept_naming(concepts, best)
        if features.clip is not None:
            embeds = self.clip.pool(features.clip, masks=masks.sigmoid())
            return Naming(embeds, embeds.new_tensor(100.0), embeds.new_tensor(0.0))
        return Naming(None, None, None)

    def _concept_naming(self, concepts: ConceptOutput, index: Tensor) -> "Naming":
        """The class embeddings of some locations, index [B, I], each with its own scale and shift."""
        return Naming(*(_take(t, index) for t in (concepts.embeds, concepts.logit_scale, concepts.logit_shift)))

    def _mask_stride(self, masks: Tensor) -> float:
        return self.sam.image_size / masks.shape[-1]


@dataclass
class Naming:
    """Class embeddings [B, I, D] with the scale and shift that turn a cosine into a logit (broadcast to [B, I, 1])."""

    embeds: Tensor | None
    scale: Tensor | None
    shift: Tensor | None

    def best_logit(self, words: Tensor, asked: Tensor | None = None) -> Tensor:
        """The largest of `logits`, [B, I], at a fraction of the memory traffic: scale and shift are the same for all
        words and keep their order, so that they come after the maximum."""
        cosine = self.embeds @ words.to(self.embeds.dtype).T  # [B, I, K]
        if asked is not None:
            cosine = cosine.masked_fill(~asked[:, None], torch.finfo(cosine.dtype).min)
        return ((cosine.amax(-1, keepdim=True) + self.shift) * self.scale)[..., 0]

    def logits(self, words: Tensor | None, asked: Tensor | None = None) -> Tensor | None:
        """words [K, D] -> [B, I, K]: (cosine + shift) * scale, each word by itself; asked [B, K] bool, all if None."""
        if words is None or self.embeds is None:
            return None
        logits = (self.embeds @ words.to(self.embeds.dtype).T + self.shift) * self.scale
        return logits if asked is None else logits.masked_fill(~asked[:, None], torch.finfo(logits.dtype).min)


def mean_logits(namings: list[Naming], words: Tensor | None, asked: Tensor | None = None) -> Tensor | None:
    """The mean of what several namings of the same instances say, [B, I, K]."""
    if words is None:
        return None
    return torch.stack([naming.logits(words, asked) for naming in namings]).mean(0)


def instance_scores(logits: Tensor, objectness: Tensor | None) -> Tensor:
    """How likely an instance is what the word says: for a proposal, the geometric mean of "is it this word" and "is it
    a thing, and is this box its box". Any shape."""
    score = logits.sigmoid()
    return score if objectness is None else (score * objectness).sqrt()


def crop(masks: Tensor, boxes: Tensor) -> Tensor:
    """Mask logits [B, I, h, w] are made certainly empty outside their box [B, I, 4] (in cells), grown by a cell."""
    y = torch.arange(masks.shape[-2], device=masks.device) + 0.5
    x = torch.arange(masks.shape[-1], device=masks.device) + 0.5
    columns = (x > boxes[..., 0:1] - 1) & (x < boxes[..., 2:3] + 1)  # [B, I, w]
    rows = (y > boxes[..., 1:2] - 1) & (y < boxes[..., 3:4] + 1)  # [B, I, h]
    return masks.masked_fill(~(rows[..., :, None] & columns[..., None, :]), -20.0)


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    """tensor [B, L, X], index [B, I] -> [B, I, X]"""
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))
