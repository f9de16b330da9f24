"""Stage `finetune`: ConceptHead and Clip2SamAdapter of a whole model, fine-tuned on images and words of the user.

The towers are frozen, and the heads are trained on the computation of inference: text queries on locations, class names
on the masks that the model's own SAM side predicts for boxes and clicks. `train_clip` also trains a small CLIP tower of
this project, by its LiT loss and through the heads; released towers should stay frozen.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsam.errors import InputError
from ovsam.modeling.adapters.concepts import ConceptHead
from ovsam.modeling.clip.base import mask_pool
from ovsam.modeling.modeling_ovsam import OVSamModel
from ovsam.modeling.outputs import OVSamFeatures
from ovsam.ops.boxes import masks_to_boxes
from ovsam.training.stages.concepts import ConceptsStage
from ovsam.training.stages.predictions import Found
from ovsam.training.stages.prompts import choose_objects, jitter_boxes, random_points, visible_objects
from ovsam.training.stages.text_embeddings import WordTable
from ovsam.training.stages.towers import IMAGENET_MEAN, IMAGENET_STD, Pixels
from ovsam.training.stages.word_losses import LitLosses, WordLosses


class FinetuneStage(ConceptsStage):
    """
    Args:
        words: words embedded by the model's own text tower.
        model: model with a ConceptHead, a Clip2SamAdapter, or both; SAM and CLIP must have the same input.
        prompts: number of objects of each image that are classified.
        box_share: share of the steps with boxes; the others have clicks.
        label_smoothing, word_weight, mask_objects, box_noise: as in ConceptsStage.
        train_clip: whether to train the image tower of the CLIP side too.
        keyword_weight: weight of its loss against keywords.
    """

    def __init__(
        self,
        words: WordTable,
        model: OVSamModel,
        prompts: int = 12,
        box_share: float = 0.6,
        label_smoothing: float = 0.05,
        word_weight: float = 0.2,
        mask_objects: int = 6,
        box_noise: float = 0.06,
        train_clip: bool = False,
        keyword_weight: float = 0.3,
    ):
        nn.Module.__init__(self)  # skip the parent, which would build a new head
        self.model = model.requires_grad_(False)
        self.heads = [part for part in (model.concepts, model.clip2sam) if part is not None]
        if not self.heads:
            raise InputError(
                "This model has neither ConceptHead nor Clip2SamAdapter, so there is nothing to fine-tune; "
                "compose it with one of them."
            )
        if model.concepts is not None and not isinstance(model.concepts, ConceptHead):
            raise InputError(
                f"A {type(model.concepts).__name__} cannot be fine-tuned; the model must have a ConceptHead."
            )
        for head in self.heads:
            head.requires_grad_(True)
        self.word_losses = WordLosses(words, label_smoothing)
        self.lit = None
        if train_clip:
            model.clip.requires_grad_(True)
            if getattr(model.clip, "text_model", None) is None or model.sam2clip is not None:
                raise InputError(
                    "train_clip needs a CLIP side with a text tower, beside a SAM encoder; leave it out for this model."
                )
            model.clip.text_model.requires_grad_(False)  # locked
            self.lit = LitLosses(words, label_smoothing, keyword_weight)
            nn.init.constant_(self.lit.log_scale, 4.0)  # the value at the end of the clip stage
        self.prompts, self.box_share = prompts, box_share
        self.word_weight, self.teacher_weight = word_weight, 0.0
        self.mask_objects, self.box_noise = mask_objects, box_noise
        self.cache, self.map_dropout = False, 0.0
        clip = model.clip if model.config.composition == "clip" else None  # whose pixels are the model's, as in compose
        mean, std = (clip.image_mean, clip.image_std) if clip is not None else (IMAGENET_MEAN, IMAGENET_STD)
        self.pixels = Pixels(mean, std)

    @property
    def concepts(self) -> ConceptHead:  # type: ignore[override]
        return self.model.concepts

    def train(self, mode: bool = True):
        super().train(mode)
        self.model.eval()  # frozen batch statistics are not updated
        for part in (*self.heads, *([self.model.clip.vision_model] if self.lit else [])):
            part.train(mode)
        return self

    def published_state(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load_published(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)

    def forward(
        self, image: Tensor, masks: Tensor, word_ids: Tensor, known: Tensor, **kept: Tensor
    ) -> dict[str, Tensor]:
        features = self.model.encode(self.pixels(image))  # no gradients for frozen towers
        losses, metrics = {}, {}
        if self.model.concepts is not None:
            losses, metrics = self.concept_losses(features.concepts, masks, word_ids, known)
        visible = visible_objects(masks, word_ids)
        if self.model.clip2sam is not None:
            name_losses, metrics["mask_top1"] = self.naming_losses(features, masks, visible, word_ids, known)
            losses |= name_losses
        if self.lit is not None:
            embeds = F.normalize(mask_pool(features.clip.pool_map, masks)[visible].float(), dim=-1)
            lit = self.lit(embeds, word_ids[visible])
            losses["lit"], metrics["lit_top1"] = lit["loss"], lit["top1"]
        metrics |= {name: value.detach() for name, value in losses.items()}
        return {"loss": sum(losses.values()), **metrics}

    def naming_losses(
        self, features: OVSamFeatures, masks: Tensor, visible: Tensor, word_ids: Tensor, known: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of the class names of masks that the model predicts for boxes or clicks."""
        masks, visible, keep = choose_objects(masks, self.prompts, visible)  # [B, P, H, W], [B, P]
        if torch.rand(()) < self.box_share:
            prompts = {"input_boxes": jitter_boxes(masks_to_boxes(masks), 0.02, float(masks.shape[-1]))}
        else:
            prompts = {"input_points": random_points(masks.flatten(0, 1)).view(*visible.shape, 1, 2)}
        embeds = self.model(features=features, **prompts).class_embeds[visible]  # [n, D]
        ids = word_ids.gather(1, keep)[visible]
        name_loss, top1 = self.word_losses.classify(embeds, ids)
        asked = self.word_losses.known_texts(known)[visible.nonzero()[:, 0]]  # [n, V + Kw]
        logits = self.model.clip2sam.logits(embeds[None], self.word_losses.texts)[0]
        word_loss = self.word_losses.word_loss(logits, ids, asked)
        return {"mask_name": name_loss, "mask_word": self.word_weight * word_loss}, top1

    @torch.no_grad()
    def predict(self, image: Tensor, masks: Tensor, word_ids: Tensor, known: Tensor) -> list[Found]:
        """Return the instances of the trained words; without a ConceptHead, the class names of the true boxes."""
        count, threshold, found = self.word_losses.count, self.model.config.score_threshold, []
        for b in range(len(image)):
            question = {"text_embeds": self.word_losses.texts[:count]}
            if self.model.concepts is None:
                there = masks[b].flatten(1).any(1)
                question["input_boxes"] = masks_to_boxes(masks[b : b + 1, there])
            outputs = self.model(pixel_values=self.pixels(image[b : b + 1]), **question)
            scores, best = outputs.scores[0].float().max(-1)  # [I]
            kept = scores >= (threshold if self.model.concepts is not None else 0)
            found.append((outputs.pred_masks[0, kept, 0] > 0, self.word_losses.base_ids[best[kept]], scores[kept]))
        return found
