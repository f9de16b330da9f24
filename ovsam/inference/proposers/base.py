"""The input and output of a proposer, and the decoding of proposals into instances."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ovsam.errors import InputError
from ovsam.modeling.geometry import boxes_from_clip
from ovsam.ops.boxes import masks_to_boxes
from ovsam.ops.masks import OUTSIDE, mask_logits
from ovsam.ops.scores import calibrated, instance_scores
from ovsam.processing.arguments import short

if TYPE_CHECKING:
    from ovsam.modeling.modeling_ovsam import OVSamModel
    from ovsam.modeling.outputs import OVSamFeatures, OVSamOutput
    from ovsam.processing.processing_ovsam import OVSamProcessor


@dataclass(frozen=True)
class Question:
    """The input of a proposer, for one image.

    words: K phrases, empty in everything mode without a vocabulary; text_embeds: their embeddings [K, D]; everything:
    whether all objects are proposed and the words only classify them; features: those of the image, by `model`; labels:
    the words in the form of the processor, such as a mapping of phrases to class names.
    """

    image: Image.Image
    words: list[str]
    text_embeds: Tensor | None
    everything: bool
    model: "OVSamModel"
    processor: "OVSamProcessor"
    features: "OVSamFeatures"
    labels: Sequence[str] | Mapping[str, str] | None = None

    @property
    def extent(self) -> tuple[float, float]:
        """Width and height, in pixels of the model input, of the part that shows the image (the rest is padding)."""
        share = self.processor.picture_share(self.image.height, self.image.width)
        return share[0] * self.model.sam.image_size, share[1] * self.model.sam.image_size

    def check_named(self) -> None:
        """Raises InputError for text queries to a model without any part that classifies."""
        namers = self.model.clip2sam, self.features.clip, self.features.concepts
        if self.words and not self.everything and all(namer is None for namer in namers):
            raise InputError(
                "This model has no CLIP image tower, ConceptHead or Clip2SamAdapter, so it cannot classify; text "
                "queries need a proposer that scores them, such as detector:google/owlv2-base-patch16-ensemble."
            )

    def boxes_from_clip(self, boxes: Tensor) -> Tensor:
        """boxes [n, 4] in fractions of CLIP's input -> in pixels of the image, clipped to it."""
        height, width = self.features.clip_size
        boxes = boxes * torch.tensor([width, height, width, height], device=boxes.device)
        boxes = boxes_from_clip(boxes[None], self.features.clip_frame)[0]
        per_pixel = torch.tensor([self.image.width, self.image.height] * 2) / torch.tensor([*self.extent] * 2)
        limit = torch.tensor([self.image.width, self.image.height] * 2, device=boxes.device)
        return torch.minimum((boxes * per_pixel.to(boxes.device)).clamp(min=0), limit)

    def masks_from_model(self, masks: Tensor) -> Tensor:
        """masks [n, h, w] over the model input -> the part of them that lies over the image."""
        width, height = (
            round(side / self.model.sam.image_size * n) for side, n in zip(self.extent, masks.shape[:0:-1], strict=True)
        )
        return masks[:, :height, :width]


@dataclass
class Proposals:
    """n candidate objects, in pixels of the image; at least one of boxes, points and masks.

    boxes [n, 4] xyxy and points [n, 2] xy are prompts for the SAM side. masks [n, H, W], bool or logits, over the whole
    image at any resolution, are taken as they are. scores [n] in [0, 1]: objectness, 1 if not given. word_scores [n, K]
    in [0, 1]: class scores of the proposer, if it has any; otherwise the model classifies the objects.
    """

    boxes: Tensor | None = None
    points: Tensor | None = None
    masks: Tensor | None = None
    scores: Tensor | None = None
    word_scores: Tensor | None = None

    def __len__(self) -> int:
        return next(len(given) for given in (self.masks, self.boxes, self.points) if given is not None)


Proposer = Callable[[Question], Proposals]


def text_inputs(
    labels: Sequence[str] | Mapping[str, str] | None,
    embeds: Tensor | None,
    negatives: tuple[list[str], Tensor] | None = None,
) -> dict[str, Any]:
    """Return the model's arguments for words that are already embedded.

    Args:
        labels: the words as the processor takes them, or the class name of each of the K rows.
        embeds: [K, D].
        negatives: the negative words and their embeddings [K', D].
    """
    rows = [given for given in (embeds, None if negatives is None else negatives[1]) if given is not None]
    return {
        "text_embeds": torch.cat(rows) if rows else None,
        "text_labels": labels,
        "negative_labels": None if negatives is None else negatives[0],
    }


@torch.no_grad()
def decode_proposals(
    question: Question, proposals: Proposals, negatives: tuple[list[str], Tensor] | None = None
) -> "OVSamOutput":
    """Proposals -> the model's output for them: masks by the SAM side (or as proposed), class scores by the model (or
    as proposed), objectness as proposed. One image, B = 1.

    Raises:
        InputError: the proposer gave neither boxes, points nor masks, or tensors that do not agree.
    """
    model, device = question.model, question.model.device
    _check(proposals, len(question.words))
    if proposals.word_scores is None:
        question.check_named()
    prompts = {}
    size = [(question.image.height, question.image.width)]
    if proposals.boxes is not None and len(proposals):
        boxes = question.processor(input_boxes=[proposals.boxes.tolist()], original_sizes=size)
        prompts["input_boxes"] = boxes["input_boxes"]
    if proposals.points is not None and len(proposals):
        points = question.processor(
            input_points=[[[xy] for xy in proposals.points.tolist()]],
            input_labels=[[[1]] * len(proposals)],
            original_sizes=size,
        )
        prompts |= {name: points[name] for name in ("input_points", "input_labels")}
    if proposals.masks is not None and len(proposals):
        masks = question.processor.mask_prompts(proposals.masks, model.sam.image_size)
        prompts |= {"input_masks": masks, "input_boxes": mask_boxes(masks)}
    if not len(proposals):  # a prompt that post-processing removes
        prompts = {"input_boxes": torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])}
    outputs = model(
        features=question.features,
        **text_inputs(question.labels, question.text_embeds, negatives),
        multimask_output="input_points" in prompts and "input_boxes" not in prompts,
        refine="input_masks" not in prompts,
        **{name: prompt.to(device) for name, prompt in prompts.items()},
    )
    outputs.everything = question.everything
    if not len(proposals):
        outputs.valid = torch.zeros_like(outputs.valid)
        outputs.objectness = torch.zeros(1, 1, device=device)
        return outputs
    if proposals.masks is not None:
        outputs.pred_masks, outputs.iou_scores = _over_input(question, proposals.masks).to(device), None
    scores = torch.ones(len(proposals)) if proposals.scores is None else proposals.scores
    outputs.objectness = scores.to(device).float()[None]
    if outputs.iou_scores is not None and proposals.word_scores is None:
        # Multiply objectness by the predicted IoU (YOLACT++'s re-scoring).
        outputs.objectness = outputs.objectness * outputs.iou_scores.float().amax(-1).clamp(0, 1)
    config = model.config
    weight = 0.0 if question.everything else config.objectness_weight
    calibration = config.name_calibration if question.everything else config.score_calibration
    if proposals.word_scores is not None:
        known = proposals.word_scores.to(device).float()[None]  # [1, n, K]
        outputs.logits, outputs.scores = known.logit(eps=1e-6), known
    elif outputs.logits is not None:
        scores = instance_scores(outputs.logits.float(), outputs.objectness[..., None], weight)
        outputs.scores = calibrated(scores, calibration)
    if outputs.negative_logits is not None:
        scores = instance_scores(outputs.negative_logits.float(), outputs.objectness[..., None], weight)
        outputs.negative_scores = calibrated(scores, calibration)
    return outputs


def mask_boxes(masks: Tensor) -> Tensor:
    """input_masks [B, P, H/4, W/4] -> their boxes [B, P, 4] in pixels of the model input."""
    return masks_to_boxes(masks > 0) * 4


def _over_input(question: Question, masks: Tensor) -> Tensor:
    """Masks [n, h, w] over the image -> logits [1, n, 1, h', w'] over the model input, at the same resolution."""
    logits = mask_logits(masks)
    width, height = (side / question.model.sam.image_size for side in question.extent)
    h, w = masks.shape[1:]
    right, below = round(w / width) - w, round(h / height) - h
    return F.pad(logits, (0, right, 0, below), value=OUTSIDE)[None, :, None]


def _check(proposals: Proposals, words: int) -> None:
    if not isinstance(proposals, Proposals):
        raise InputError(f"A proposer must return Proposals; this one returned {short(proposals)}.")
    shapes: dict[str, tuple] = {
        "boxes": ("n", 4),
        "points": ("n", 2),
        "masks": ("n", "H", "W"),
        "scores": ("n",),
        "word_scores": ("n", words),
    }
    given = {name: getattr(proposals, name) for name in shapes if getattr(proposals, name) is not None}
    if not given.keys() & {"boxes", "points", "masks"}:
        raise InputError("A proposer must give boxes [n, 4], points [n, 2] or masks [n, H, W].")
    for name, tensor in given.items():
        want = shapes[name]
        if not isinstance(tensor, Tensor) or (tensor.is_floating_point() and not tensor.isfinite().all()):
            raise InputError(f"A proposer's {name} must be a tensor of finite numbers; got {short(tensor)}.")
        fits = tensor.ndim == len(want) and len(tensor) == len(proposals)
        fits &= all(not isinstance(side, int) or side == have for side, have in zip(want, tensor.shape, strict=False))
        if not fits:
            expected = ", ".join(map(str, want))
            raise InputError(
                f"A proposer's {name} must be [{expected}] with n = {len(proposals)}; got {list(tensor.shape)}."
            )
