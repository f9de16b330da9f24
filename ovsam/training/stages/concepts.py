"""Stage `concepts`: ConceptHead over frozen maps: for every location an objectness, a box, a class embedding, a mask.

Locations are assigned to objects by the exact masks: a location on the pixels of an object belongs to it, with a higher
weight near the centre of the object. Class names are trained as in word_losses.py; if an image was not annotated for a
class name (LVIS), its background is no negative for it. Objects without a class name (SA-1B) train all other outputs.

In the composition `sam` the maps are the pyramid of the SAM side, and CLIP is distilled into the head: its class
embeddings are trained towards those of a CLIP or OWLv2 teacher for the same objects.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.ops import nms, roi_align

from ovsam.modeling.adapters.concepts import ConceptHead, ConceptHeadConfig
from ovsam.modeling.adapters.mask_head import mask_regions
from ovsam.modeling.outputs import ConceptOutput
from ovsam.ops.boxes import masks_to_boxes
from ovsam.ops.masks import paste
from ovsam.training.stages.losses import dice_loss, giou_loss, mask_iou
from ovsam.training.stages.predictions import Found
from ovsam.training.stages.prompts import choose_objects, resize_masks
from ovsam.training.stages.text_embeddings import WordTable
from ovsam.training.stages.towers import Towers, start_region
from ovsam.training.stages.word_losses import WordLosses, check_width

# An object is assigned to a level if the longer side of its box, in strides, is in this range; the ranges overlap. The
# finest level has all smaller objects, the coarsest all larger ones.
LEVEL_RANGE = (2.25, 6.875)


@dataclass
class Assignment:
    """For each location: `owner` [B, L] object index (only meaningful where centrality > 0), `centrality` [B, L]."""

    owner: Tensor
    centrality: Tensor


class ConceptsStage(nn.Module):
    """
    Args:
        words: words embedded by CLIP's text tower.
        towers: towers with the maps that the head reads.
        width: width of the head.
        strides, mask_stride: see ConceptHeadConfig.
        label_smoothing: label smoothing of the cross entropy among names.
        word_weight: weight of the sigmoid loss for each text.
        teacher_weight: weight of the distance (1 - cosine) between the class embeddings of a location and of the
            teacher, in the composition `sam`.
        cache: whether to store the maps of the frozen towers on disk (2 bytes a number: 1.9 MB for an image of 512
            pixels and EfficientNet-Lite2), instead of encoding every sample again; for data with few `draws`.
        map_dropout: share of the channels of the two coarse maps that are dropped in a step.
        mask_objects: number of objects of each image with a mask loss.
        box_noise: standard deviation of the boxes of the mask loss, as a share of their sides.
    """

    def __init__(
        self,
        words: WordTable,
        towers: Towers,
        width: int = 256,
        strides: tuple[int, ...] = (16, 32),
        mask_stride: int = 4,
        label_smoothing: float = 0.05,
        word_weight: float = 0.2,
        teacher_weight: float = 0.0,
        mask_objects: int = 6,
        box_noise: float = 0.06,
        cache: bool = False,
        map_dropout: float = 0.0,
    ):
        super().__init__()
        check_width(words, towers.embed_dim)
        self.towers = towers
        self.size = {"in_channels": towers.channels, "embed_dim": towers.embed_dim, "width": width}
        head = ConceptHeadConfig(**self.size, strides=strides, mask_stride=mask_stride)
        self.concepts = start_region(ConceptHead(head), towers)
        self.word_losses = WordLosses(words, label_smoothing)
        self.word_weight, self.teacher_weight = word_weight, teacher_weight
        self.mask_objects, self.box_noise = mask_objects, box_noise
        self.cache, self.map_dropout = cache, map_dropout

    def published_state(self) -> dict[str, Tensor]:
        return {f"concepts.{name}": tensor for name, tensor in self.concepts.state_dict().items()}

    def load_published(self, state: dict[str, Tensor]) -> None:
        own = {name.removeprefix("concepts."): t for name, t in state.items() if name.startswith("concepts.")}
        self.concepts.load_state_dict(own)

    def prepare(self, data: Dataset, folder: Path, data_key: str) -> Dataset:
        """Return the training set, with the maps of every sample beside it if they are kept."""
        return self.towers.keep_maps(data, folder, data_key) if self.cache else data

    def drop(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Leave out channels of the maps at strides 16 and 32."""
        fine, coarse = maps[:2], maps[2:]
        return (*fine, *(F.dropout2d(feature, self.map_dropout, self.training) for feature in coarse))

    def forward(
        self, image: Tensor, masks: Tensor, word_ids: Tensor, known: Tensor, **kept: Tensor
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            maps = self.drop(self.towers.maps(image, kept=kept))
            taught = self.teach(image, masks)
        masks = resize_masks(masks, self.towers.frame(image))
        losses, metrics = self.concept_losses(self.concepts(maps), masks, word_ids, known, taught)
        metrics |= {name: value.detach() for name, value in losses.items()}
        return {"loss": sum(losses.values()), **metrics}

    def teach(self, image: Tensor, masks: Tensor) -> Tensor | None:
        """Return the embeddings of the objects by the teacher [B, O, D], None without a teacher."""
        return self.towers.teach(image, masks_to_boxes(masks)) if self.teacher_weight else None

    def concept_losses(
        self, out: ConceptOutput, masks: Tensor, word_ids: Tensor, known: Tensor, taught: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        # A whole-image mask (classification data) has a class name, but no locations.
        whole = masks.flatten(2).all(-1).any(1)  # [B]
        masks, known = masks & ~whole[:, None, None, None], known & ~whole[:, None]
        boxes = masks_to_boxes(masks)
        place = assign(masks, boxes, self.concepts.config.strides)
        truth = boxes.take_along_dim(place.owner[..., None], 1)  # [B, L, 4]
        on = place.centrality > 0.02
        regression, iou = giou_loss(out.boxes[on], truth[on])
        box_loss = (regression * place.centrality[on]).sum() / place.centrality[on].sum().clamp(min=1)

        # The target of objectness is the quality of a location: centrality and IoU of its box (varifocal weights).
        quality = torch.zeros_like(place.centrality)
        quality[on] = place.centrality[on] * iou.detach().clamp(0, 1)
        objectness = out.objectness.float()
        weight = torch.where(quality > 0, quality, 0.75 * objectness.detach().sigmoid() ** 2)
        pointwise = F.binary_cross_entropy_with_logits(objectness, quality, reduction="none")
        objectness_loss = (pointwise * weight * ~whole[:, None]).sum() / quality.sum().clamp(min=1)

        # Central locations have word losses; background of the highest objectness has negative word losses.
        batch, location = (place.centrality > 0.5).nonzero(as_tuple=True)
        owner = place.owner[batch, location]
        losses = {"box": 2 * box_loss, "objectness": 2 * objectness_loss}
        losses["mask"], iou_of_masks = self.mask_loss(out, masks)
        if taught is not None:
            distance = 1 - (out.embeds[batch, location].float() * taught[batch, owner].float()).sum(-1)
            losses["teacher"] = self.teacher_weight * distance.sum() / max(len(distance), 1)
        background = objectness.detach().masked_fill(place.centrality > 0, -1e4)
        worst = background.topk(min(24, background.shape[1]), dim=1).indices  # [B, 24]
        worst_batch = torch.arange(len(worst), device=worst.device).repeat_interleave(worst.shape[1])
        # An object without a class name has box and mask losses, but no word loss.
        named = word_ids[batch, owner] >= 0
        batch, location, owner = batch[named], location[named], owner[named]
        batch_all, location_all = torch.cat([batch, worst_batch]), torch.cat([location, worst.flatten()])
        ids = word_ids[batch, owner]
        name_loss, top1 = self.word_losses.classify(out.embeds[batch, location], ids)
        logits = out.embeds[batch_all, location_all] @ self.word_losses.texts.T
        logits = (logits + out.logit_shift[batch_all, location_all]) * out.logit_scale[batch_all, location_all]
        word_loss = self.word_losses.word_loss(logits, ids, self.word_losses.known_texts(known)[batch_all])
        losses |= {"concept_name": name_loss, "concept_word": self.word_weight * word_loss}
        metrics = {"concept_top1": top1, "box_iou": iou.detach().sum() / max(len(iou), 1), "mask_iou": iou_of_masks}
        return losses, metrics

    def mask_loss(self, out: ConceptOutput, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of the mask head at both of its resolutions (cross entropy and Dice), and the mean IoU inside the
        regions. Boxes are those of some objects of each image, moved at random: a few are exact, a few far off."""
        masks, valid, _ = choose_objects(masks, self.mask_objects)  # [B, P, H, W], [B, P]
        boxes = masks_to_boxes(masks)
        noise = torch.randn_like(boxes[..., :1]).abs().clamp(max=2) * self.box_noise
        sides = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
        regions = mask_regions(boxes + torch.randn_like(boxes) * noise * sides)
        each = torch.arange(regions.shape[0] * regions.shape[1], device=masks.device)[:, None]
        rois = torch.cat([each, regions.flatten(0, 1)], 1)
        predicted = self.concepts.mask_head(out.mask_features, regions)  # [B, P, r, r] at two resolutions
        truth = roi_align(masks.flatten(0, 1)[:, None].float(), rois, predicted[-1].shape[-1], 1.0, 2, aligned=True)
        loss = masks.new_zeros((), dtype=torch.float32)
        for logits in predicted:
            logits = logits.float()
            target = F.adaptive_avg_pool2d(truth, logits.shape[-1])[:, 0].unflatten(0, regions.shape[:2])
            pixel = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((-1, -2))
            each_loss = pixel + dice_loss(logits, target)
            loss = loss + (each_loss * valid).sum() / valid.sum().clamp(min=1)
        iou = mask_iou(predicted[-1].detach(), target)
        return loss, (iou * valid).sum() / valid.sum().clamp(min=1)

    @torch.no_grad()
    def predict(self, image: Tensor, masks: Tensor, word_ids: Tensor, known: Tensor) -> list[Found]:
        """Return instances of the base words: boxes, masks, the word of highest score."""
        out, frame, found = self.concepts(self.towers.maps(image)), self.towers.frame(image), []
        names = self.word_losses.texts[: self.word_losses.count]
        for b in range(len(image)):
            logits = (out.embeds[b] @ names.T + out.logit_shift[b]) * out.logit_scale[b]
            best, word = logits.float().sigmoid().max(-1)  # [L]
            score, location = (best * out.objectness[b].float().sigmoid()).sqrt().topk(min(100, len(best)))
            keep = nms(out.boxes[b, location], score, 0.6)
            keep = keep[score[keep] > 0.3]
            score, location = score[keep], location[keep]
            regions = mask_regions(out.boxes[b : b + 1, location])
            features = tuple(feature[b : b + 1] for feature in out.mask_features)
            logits = self.concepts.mask_head(features, regions)[-1]
            proposed = paste(logits, regions / 4, (frame // 4, frame // 4))[0]
            found.append((proposed > 0, self.word_losses.base_ids[word[location]], score))
        return found


def assign(masks: Tensor, boxes: Tensor, strides: tuple[int, ...]) -> Assignment:
    """Assign each location to an object, with its centrality: a Gaussian around the mean of the visible pixels."""
    height, width = masks.shape[-2:]
    soft = masks.float()  # sums of bool tensors take many times longer
    columns, rows = soft.sum(2), soft.sum(3)  # [B, O, W], [B, O, H]
    area = rows.sum(-1).clamp(min=1)  # [B, O]
    y, x = torch.arange(height, device=masks.device) + 0.5, torch.arange(width, device=masks.device) + 0.5
    center_x = (columns @ x) / area
    center_y = (rows @ y) / area
    longer = (boxes[..., 2:] - boxes[..., :2]).amax(-1)  # [B, O]
    owners, centralities = [], []
    for level, stride in enumerate(strides):
        low = LEVEL_RANGE[0] * stride if level else 0.0
        high = LEVEL_RANGE[1] * stride if level < len(strides) - 1 else float("inf")
        here = masks[..., stride // 2 :: stride, stride // 2 :: stride]  # [B, O, h, w]
        h, w = here.shape[-2:]
        fits = (longer >= low) & (longer <= high) & (longer > 0)  # [B, O]
        cy = (torch.arange(h, device=masks.device) + 0.5).view(1, 1, h, 1) * stride
        cx = (torch.arange(w, device=masks.device) + 0.5).view(1, 1, 1, w) * stride
        distance = ((cx - center_x[..., None, None]) ** 2 + (cy - center_y[..., None, None]) ** 2).sqrt()
        spread = (0.3 * longer).clamp(min=0.8 * stride)[..., None, None]
        value = torch.exp(-((distance / spread) ** 2)) * fits[..., None, None]  # [B, O, h, w]
        # A location belongs to the object of its pixel, to the most central one if there are several. The cell nearest
        # to the centre always belongs to the object, so that thin and hollow objects have a location.
        nearest = (distance == distance.flatten(2).amin(-1)[..., None, None]) & fits[..., None, None]
        value = value * here + nearest * 1.5
        best, owner = value.max(1)  # [B, h, w]
        owners.append(owner.flatten(1))
        centralities.append(best.clamp(max=1).flatten(1))
    return Assignment(torch.cat(owners, 1), torch.cat(centralities, 1))
