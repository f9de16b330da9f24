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
from torchvision.ops import nms

from ovsam.modeling.adapters.concepts import ConceptHead, ConceptHeadConfig
from ovsam.modeling.outputs import ConceptOutput
from ovsam.ops.boxes import masks_to_boxes
from ovsam.ops.masks import EMPTY, crop
from ovsam.training.stages.losses import dice_loss, giou_loss
from ovsam.training.stages.predictions import Found
from ovsam.training.stages.prompts import resize_masks
from ovsam.training.stages.text_embeddings import WordTable
from ovsam.training.stages.towers import Towers, start_region
from ovsam.training.stages.word_losses import WordLosses, check_width

# An object is assigned to a level if the longer side of its box, in pixels, is in this range; the ranges overlap.
LEVEL_RANGES = ((0.0, 110.0), (72.0, 1e4))


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
        label_smoothing: label smoothing of the cross entropy among names.
        word_weight: weight of the sigmoid loss for each text.
        teacher_weight: weight of the distance (1 - cosine) between the class embeddings of a location and of the
            teacher, in the composition `sam`.
        cache: whether to store the maps of the frozen towers on disk (2 bytes a number: 1.9 MB for an image of 512
            pixels and EfficientNet-Lite2), instead of encoding every sample again; for data with few `draws`.
        map_dropout: share of the channels of the two coarse maps that are dropped in a step.
        mask_locations: number of locations of a batch with a mask loss; 0 for all. YOLACT takes 100 for each image.
    """

    def __init__(
        self,
        words: WordTable,
        towers: Towers,
        width: int = 256,
        label_smoothing: float = 0.05,
        word_weight: float = 0.2,
        teacher_weight: float = 0.0,
        mask_locations: int = 0,
        cache: bool = False,
        map_dropout: float = 0.0,
    ):
        super().__init__()
        check_width(words, towers.embed_dim)
        self.towers = towers
        self.size = {"in_channels": towers.channels, "embed_dim": towers.embed_dim, "width": width}
        self.concepts = start_region(ConceptHead(ConceptHeadConfig(**self.size)), towers)
        self.word_losses = WordLosses(words, label_smoothing)
        self.word_weight, self.teacher_weight, self.mask_locations = word_weight, teacher_weight, mask_locations
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
        place = assign(masks, boxes, self.concepts.strides)
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

        # Central locations have mask and word losses; background of the highest objectness has negative word losses.
        batch, location = (place.centrality > 0.5).nonzero(as_tuple=True)
        owner = place.owner[batch, location]
        mask_loss = self.prototype_loss(out, masks, boxes, batch, location, owner)
        losses = {"box": 2 * box_loss, "objectness": 2 * objectness_loss, "mask": mask_loss}
        if taught is not None:
            distance = 1 - (out.embeds[batch, location].float() * taught[batch, owner].float()).sum(-1)
            losses["teacher"] = self.teacher_weight * distance.sum() / max(len(distance), 1)
        background = objectness.detach().masked_fill(place.centrality > 0, -1e4)
        worst = background.topk(min(24, background.shape[1]), dim=1).indices  # [B, 24]
        worst_batch = torch.arange(len(worst), device=worst.device).repeat_interleave(worst.shape[1])
        # An object without a class name has a box and a mask loss, but no word loss.
        named = word_ids[batch, owner] >= 0
        batch, location, owner = batch[named], location[named], owner[named]
        batch_all, location_all = torch.cat([batch, worst_batch]), torch.cat([location, worst.flatten()])
        ids = word_ids[batch, owner]
        name_loss, top1 = self.word_losses.classify(out.embeds[batch, location], ids)
        logits = out.embeds[batch_all, location_all] @ self.word_losses.texts.T
        logits = (logits + out.logit_shift[batch_all, location_all]) * out.logit_scale[batch_all, location_all]
        word_loss = self.word_losses.word_loss(logits, ids, self.word_losses.known_texts(known)[batch_all])
        losses |= {"concept_name": name_loss, "concept_word": self.word_weight * word_loss}
        return losses, {"concept_top1": top1, "box_iou": iou.detach().sum() / max(len(iou), 1)}

    def prototype_loss(
        self, out: ConceptOutput, masks: Tensor, boxes: Tensor, batch: Tensor, location: Tensor, owner: Tensor
    ) -> Tensor:
        """YOLACT's (Bolya et al. 2019): cross entropy inside the true box, normalised by its area, and Dice."""
        if self.mask_locations and len(batch) > self.mask_locations:
            # Sorted, since the images are processed one by one.
            some = torch.randperm(len(batch), device=batch.device)[: self.mask_locations].sort().values
            batch, location, owner = batch[some], location[some], owner[some]
        coefficients = out.coefficients[batch, location]  # [n, Q]
        target = (F.avg_pool2d(masks.float(), 4) > 0.5).float()[batch, owner]  # [n, H/4, W/4]
        logits = torch.cat(
            [
                torch.einsum("nq,qhw->nhw", coefficients[batch == b], out.prototypes[b])
                for b in range(len(out.prototypes))
            ]
        )  # `batch` is sorted, so this is the order of `target`
        inside = box_grid(boxes[batch, owner] / 4, logits.shape[-2:])
        pixel = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * inside
        pixel = pixel.sum((-1, -2)) / inside.sum((-1, -2)).clamp(min=1)
        cropped = torch.where(inside > 0, logits, logits.new_full((), EMPTY))
        return (2 * pixel + 2 * dice_loss(cropped, target)).sum() / max(len(target), 1)

    @torch.no_grad()
    def predict(self, image: Tensor, masks: Tensor, word_ids: Tensor, known: Tensor) -> list[Found]:
        """Return instances of the base words: boxes, prototype masks, the word of highest score."""
        out, frame, found = self.concepts(self.towers.maps(image)), self.towers.frame(image), []
        names = self.word_losses.texts[: self.word_losses.count]
        for b in range(len(image)):
            logits = (out.embeds[b] @ names.T + out.logit_shift[b]) * out.logit_scale[b]
            best, word = logits.float().sigmoid().max(-1)  # [L]
            score, location = (best * out.objectness[b].float().sigmoid()).sqrt().topk(min(100, len(best)))
            keep = nms(out.boxes[b, location], score, 0.6)
            keep = keep[score[keep] > 0.3]
            score, location = score[keep], location[keep]
            proposed = torch.einsum("nq,qhw->nhw", out.coefficients[b, location], out.prototypes[b])
            boxes = out.boxes[b, location] * (proposed.shape[-1] / frame)
            found.append((crop(proposed[None], boxes[None])[0] > 0, self.word_losses.base_ids[word[location]], score))
        return found


def box_grid(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """boxes [n, 4] in cells -> [n, h, w], 1 for cells whose centre lies inside."""
    y = torch.arange(size[0], device=boxes.device) + 0.5
    x = torch.arange(size[1], device=boxes.device) + 0.5
    columns = (x >= boxes[:, None, 0]) & (x < boxes[:, None, 2])  # [n, w]
    rows = (y >= boxes[:, None, 1]) & (y < boxes[:, None, 3])  # [n, h]
    return (rows[:, :, None] & columns[:, None]).float()


def assign(masks: Tensor, boxes: Tensor, strides: tuple[int, ...]) -> Assignment:
    """Assign each location to an object, with its centrality: a Gaussian around the mean of the visible pixels."""
    height, width = masks.shape[-2:]
    area = masks.flatten(2).sum(-1).clamp(min=1).float()  # [B, O]
    y, x = torch.arange(height, device=masks.device) + 0.5, torch.arange(width, device=masks.device) + 0.5
    center_x = (masks.sum(2).float() @ x) / area
    center_y = (masks.sum(3).float() @ y) / area
    longer = (boxes[..., 2:] - boxes[..., :2]).amax(-1)  # [B, O]
    owners, centralities = [], []
    for stride, (low, high) in zip(strides, LEVEL_RANGES, strict=True):
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
