"""Stage `adapters`: ConceptHead and Clip2SamAdapter over a CLIP side, from the same scenes at once.

The CLIP side is frozen, as over a released tower; `train_clip` lets a small tower of our own learn on, by its own LiT
loss and through the adapters.

Locations are assigned to objects by the exact masks: a location on an object's pixels is that object's, more so the
nearer it is to the object's centre. Words are trained twice: by cross entropy among all names, which separates them,
and by a focal sigmoid loss per word, which makes one word's score mean something on its own.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ovsam.adapters.clip2sam import Clip2SamAdapter, Clip2SamConfig
from ovsam.adapters.concepts import ConceptHead, ConceptHeadConfig, ConceptOutput
from ovsam.boxes import masks_to_boxes
from ovsam.clip.dual_encoder import DualEncoderSide

from .clip_stage import ClipStage
from .losses import dice_loss, focal_loss, giou_loss
from .targets import object_masks
from .texts import WordTable

# An object goes to a level if its box's longer side, in pixels, lies in the level's range; the ranges overlap.
LEVEL_RANGES = ((0.0, 110.0), (72.0, 1e4))


@dataclass
class Assignment:
    """For each location: `owner` [B, L] object index (only meaningful where centrality > 0), `centrality` [B, L]."""

    owner: Tensor
    centrality: Tensor


class AdaptersStage(nn.Module):
    def __init__(
        self,
        words: WordTable,
        clip_weights: str,
        architecture: str,
        width: int,
        prompts: int,
        label_smoothing: float,
        word_weight: float,
        keyword_weight: float = 0.3,
        train_clip: bool = False,
    ):
        super().__init__()
        self.lit = ClipStage(words, architecture, label_smoothing, keyword_weight)
        self.train_clip = train_clip
        self.clip.load_state_dict({n.removeprefix("clip."): t for n, t in load_file(Path(clip_weights)).items()})
        self.lit.requires_grad_(train_clip)
        size = {"in_channels": list(self.clip.channels), "embed_dim": self.clip.embed_dim, "width": width}
        self.concepts = ConceptHead(ConceptHeadConfig(**size))
        self.clip2sam = Clip2SamAdapter(Clip2SamConfig(**size))
        for adapter in (self.concepts, self.clip2sam):
            adapter.region.detail.load_state_dict(self.clip.detail_projection.state_dict())
            adapter.region.context.load_state_dict(self.clip.context_projection.state_dict())
            adapter.to(memory_format=torch.channels_last)
        self.ce_scale = nn.Parameter(torch.tensor(4.0))  # where the clip stage ends
        nn.init.constant_(self.lit.log_scale, 4.0)
        self.prompts, self.label_smoothing, self.word_weight = prompts, label_smoothing, word_weight

        self.register_buffer("texts", torch.cat([words.names[words.is_base], words.keywords]), persistent=False)
        self.register_buffer("text_targets", text_targets(words), persistent=False)  # [W, V + Kw] of 1, 0, -1

    @property
    def clip(self) -> DualEncoderSide:
        return self.lit.clip

    def train(self, mode: bool = True):
        super().train(mode)
        self.clip.train(mode and self.train_clip)  # frozen, its batch statistics stay those of the clip stage
        return self

    def published_state(self) -> dict[str, Tensor]:
        parts = {"concepts": self.concepts, "clip2sam": self.clip2sam}
        if self.train_clip:
            parts["clip"] = self.clip
        return {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}

    def load_published(self, state: dict[str, Tensor]) -> None:
        parts: dict[str, nn.Module] = {"concepts": self.concepts, "clip2sam": self.clip2sam, "clip": self.clip}
        for part, module in parts.items():
            own = {name.removeprefix(f"{part}."): t for name, t in state.items() if name.startswith(f"{part}.")}
            if own:  # a run over a frozen CLIP side publishes none of it
                module.load_state_dict(own)

    def forward(self, image: Tensor, index_map: Tensor, word_ids: Tensor) -> dict[str, Tensor]:
        with torch.set_grad_enabled(self.train_clip and torch.is_grad_enabled()):
            features = self.clip.encode_image(self.lit.pixels(image))
        maps = features.maps
        masks = object_masks(index_map, word_ids.shape[1])  # [B, O, H, W]
        boxes = masks_to_boxes(masks)
        visible = (masks.flatten(2).sum(-1) >= 64) & (word_ids >= 0)

        losses, metrics = self.concept_losses(self.concepts(maps), masks, boxes, index_map, word_ids)
        name_losses, name_metrics = self.naming_losses(maps, masks, boxes, visible, word_ids)
        losses |= name_losses
        if self.train_clip:
            lit = self.lit.losses(features, masks, visible, word_ids)
            losses["lit"] = lit["loss"]
            metrics["lit_top1"] = lit["top1"]
        metrics |= name_metrics | {name: value.detach() for name, value in losses.items()}
        return {"loss": sum(losses.values()), **metrics}

    def concept_losses(
        self, out: ConceptOutput, masks: Tensor, boxes: Tensor, index_map: Tensor, word_ids: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        place = assign(index_map, boxes, masks, self.concepts.strides)
        truth = _take(boxes, place.owner)  # [B, L, 4]
        on = place.centrality > 0.02
        regression, iou = giou_loss(out.boxes[on], truth[on])
        box_loss = (regression * place.centrality[on]).sum() / place.centrality[on].sum().clamp(min=1)

        # Objectness learns how good a location is: central, and with a box that fits (varifocal weights).
        quality = torch.zeros_like(place.centrality)
        quality[on] = place.centrality[on] * iou.detach().clamp(0, 1)
        weight = torch.where(quality > 0, quality, 0.75 * out.objectness.detach().sigmoid() ** 2)
        pointwise = F.binary_cross_entropy_with_logits(out.objectness, quality, reduction="none")
        objectness_loss = (pointwise * weight).sum() / quality.sum().clamp(min=1)

        # Central locations learn masks and words; the most object-like background learns to have no word.
        central = place.centrality > 0.5
        batch, location = central.nonzero(as_tuple=True)
        owner = place.owner[batch, location]
        mask_loss = self.prototype_loss(out, masks, boxes, batch, location, owner)
        background = out.objectness.detach().masked_fill(place.centrality > 0, -1e4)
        worst = background.topk(min(24, background.shape[1]), dim=1).indices  # [B, 24]
        worst_batch = torch.arange(len(worst), device=worst.device).repeat_interleave(worst.shape[1])
        batch_all, location_all = torch.cat([batch, worst_batch]), torch.cat([location, worst.flatten()])
        ids = word_ids[batch, owner]
        embeds = out.embeds[batch, location]
        name_loss, top1 = self.name_loss(embeds, ids)
        logits = out.embeds[batch_all, location_all] @ self.texts.T
        logits = (logits + out.logit_shift[batch_all, location_all]) * out.logit_scale[batch_all, location_all]
        word_loss = self.word_loss(logits, ids)
        losses = {
            "box": 2 * box_loss,
            "objectness": 2 * objectness_loss,
            "mask": mask_loss,
            "concept_name": name_loss,
            "concept_word": self.word_weight * word_loss,
        }
        return losses, {"concept_top1": top1, "box_iou": iou.detach().mean()}

    def prototype_loss(
        self, out, masks: Tensor, boxes: Tensor, batch: Tensor, location: Tensor, owner: Tensor
    ) -> Tensor:
        """YOLACT's (Bolya et al. 2019): cross entropy inside the true box, normalised by its area, and Dice."""
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
        cropped = torch.where(inside > 0, logits, logits.new_full((), -20.0))
        return (2 * pixel + 2 * dice_loss(cropped, target)).sum() / max(len(target), 1)

    def naming_losses(self, maps, masks, boxes, visible, word_ids):
        """Clip2SamAdapter on up to `prompts` objects: true masks made imperfect, as the decoder's will be."""
        keep = (torch.rand(visible.shape, device=visible.device) + visible).topk(self.prompts, dim=1).indices
        masks = masks.gather(1, keep[:, :, None, None].expand(-1, -1, *masks.shape[2:]))
        boxes, visible, word_ids = _take(boxes, keep), visible.gather(1, keep), word_ids.gather(1, keep)
        soft = F.avg_pool2d(masks.float(), 4)  # [B, O, H/4, W/4]
        noise = F.interpolate(
            torch.randn(*soft.shape[:2], 8, 8, device=soft.device), size=soft.shape[-2:], mode="bilinear"
        )
        grown = F.max_pool2d(soft, 3, 1, 1)
        shrunk = -F.max_pool2d(-soft, 3, 1, 1)
        soft = torch.where(noise > 0.6, grown, torch.where(noise < -0.6, shrunk, soft))
        size = boxes[..., 2:] - boxes[..., :2]
        jittered = boxes + torch.randn_like(boxes) * 0.04 * torch.cat([size, size], -1)
        embeds = self.clip2sam(maps, jittered, soft)[visible]  # [n, D]
        ids = word_ids[visible]
        name_loss, top1 = self.name_loss(embeds, ids)
        word_loss = self.word_loss(self.clip2sam.logits(embeds[None], self.texts)[0], ids)
        return {"mask_name": name_loss, "mask_word": self.word_weight * word_loss}, {"mask_top1": top1}

    def name_loss(self, embeds: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.ce_scale.clamp(max=4.6).exp() * embeds @ self.lit.names.T
        classes = self.lit.class_of[ids]
        loss = F.cross_entropy(logits, classes, label_smoothing=self.label_smoothing)
        return loss, (logits.argmax(-1) == classes).float().mean()

    def word_loss(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Focal sigmoid loss per text. The first len(ids) rows are objects, the rest background. [n, V + Kw]"""
        target = logits.new_zeros(logits.shape)
        target[: len(ids)] = self.text_targets[ids].to(logits.dtype)
        loss = focal_loss(logits, target.clamp(min=0)) * (target >= 0)
        # Names weigh more than keywords: there is one per object, and several keywords.
        names, keywords = loss[:, : len(self.lit.names)].sum(), loss[:, len(self.lit.names) :].sum()
        return (names + 0.25 * keywords) / max(len(ids), 1)


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    """tensor [B, O, X], index [B, n] -> [B, n, X]"""
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))


def text_targets(words: WordTable) -> Tensor:
    """[W, V + Kw]: 1 a word's own name and keywords, 0 others', -1 a name that is also fair for it (left out)."""
    own = torch.eye(len(words.names))[:, words.is_base]  # [W, V]
    shared = words.has_keyword.float() @ words.has_keyword.float().T  # [W, W] keywords in common
    count = words.has_keyword.sum(1).float()
    alike = shared / torch.minimum(count[:, None], count[None]).clamp(min=1) >= 0.5
    own = torch.where(alike[:, words.is_base] & (own == 0), -1.0, own)
    return torch.cat([own, words.has_keyword.float()], 1)


def box_grid(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """boxes [n, 4] in cells -> [n, h, w], 1 for cells whose centre lies inside."""
    y = torch.arange(size[0], device=boxes.device) + 0.5
    x = torch.arange(size[1], device=boxes.device) + 0.5
    columns = (x >= boxes[:, None, 0]) & (x < boxes[:, None, 2])  # [n, w]
    rows = (y >= boxes[:, None, 1]) & (y < boxes[:, None, 3])  # [n, h]
    return (rows[:, :, None] & columns[:, None]).float()


def assign(index_map: Tensor, boxes: Tensor, masks: Tensor, strides: tuple[int, ...]) -> Assignment:
    """Which object each location belongs to, and how central it lies: a Gaussian around the visible pixels' mean."""
    b, objects, height, width = masks.shape
    area = masks.flatten(2).sum(-1).clamp(min=1).float()  # [B, O]
    y, x = torch.arange(height, device=masks.device) + 0.5, torch.arange(width, device=masks.device) + 0.5
    center_x = (masks.sum(2).float() @ x) / area
    center_y = (masks.sum(3).float() @ y) / area
    longer = (boxes[..., 2:] - boxes[..., :2]).amax(-1)  # [B, O]
    owners, centralities = [], []
    for stride, (low, high) in zip(strides, LEVEL_RANGES, strict=True):
        here = index_map[:, stride // 2 :: stride, stride // 2 :: stride]  # [B, h, w]
        h, w = here.shape[1:]
        fits = (longer >= low) & (longer <= high) & (longer > 0)  # [B, O]
        cy = (torch.arange(h, device=masks.device) + 0.5).view(1, 1, h, 1) * stride
        cx = (torch.arange(w, device=masks.device) + 0.5).view(1, 1, 1, w) * stride
        distance = ((cx - center_x[..., None, None]) ** 2 + (cy - center_y[..., None, None]) ** 2).sqrt()
        spread = (0.3 * longer).clamp(min=0.8 * stride)[..., None, None]
        value = torch.exp(-((distance / spread) ** 2)) * fits[..., None, None]  # [B, O, h, w]
        # A location is its pixel's object's. The cell nearest an object's centre is the object's in any case, so that
        # thin and hollow things have one.
        ids = torch.arange(1, objects + 1, device=masks.device)[None, :, None, None]
        nearest = (distance == distance.flatten(2).amin(-1)[..., None, None]) & fits[..., None, None]
        value = value * (here[:, None] == ids) + nearest * 1.5
        best, owner = value.max(1)  # [B, h, w]
        owners.append(owner.flatten(1))
        centralities.append(best.clamp(max=1).flatten(1))
    return Assignment(torch.cat(owners, 1), torch.cat(centralities, 1))
