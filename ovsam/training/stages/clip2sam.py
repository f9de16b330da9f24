"""Stage `clip2sam`: Clip2SamAdapter, and optionally the mask decoder, on boxes and clicks through the SAM side
(Open-Vocabulary SAM, Yuan et al. 2024, §3.3).

The SAM side segments each prompt, and the adapter classifies the predicted mask and box. The losses are 2 x cross
entropy over the class names and a background class of weight 0.1, and 5 x cross entropy and 5 x Dice of the masks on
12,544 points. With a frozen decoder the mask losses have no effect and are left out. Classification data (a folder for
each class) may be part of the data: an object that fills its image has a class name and no mask loss.
"""

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from ovsam.data.base import outlined
from ovsam.modeling.adapters.clip2sam import Clip2SamAdapter, Clip2SamConfig
from ovsam.modeling.sam import DecodedMasks, SamSide
from ovsam.ops.boxes import masks_to_boxes
from ovsam.training.stages.losses import mask_iou, point_mask_losses
from ovsam.training.stages.predictions import Found, prompted
from ovsam.training.stages.prompts import LEAST, choose_objects, jitter_boxes, random_points, resize_masks
from ovsam.training.stages.text_embeddings import WordTable
from ovsam.training.stages.towers import Towers, start_region
from ovsam.training.stages.word_losses import WordLosses, check_width


class Clip2SamStage(nn.Module):
    """
    Args:
        words: words embedded by CLIP's text tower.
        towers: towers with the maps that the adapter reads, and the SAM side.
        width: width of the adapter.
        mask_token: whether the adapter also reads the decoder's mask token.
        prompts: number of prompted objects of each image.
        background: number of prompts on the background, in images annotated for all words.
        train_decoder: whether to train the mask decoder as well (as in the paper).
        box_share: share of the steps with boxes; the others have clicks.
        box_noise: standard deviation of the sides of a box, relative to its size.
        name_weight, mask_weight, dice_weight, points, background_weight: as in the paper.
        word_weight: weight of the sigmoid loss for each text, which sets the scale and shift of the logits.
        label_smoothing: label smoothing of the cross entropy.
    """

    def __init__(
        self,
        words: WordTable,
        towers: Towers,
        width: int = 256,
        mask_token: bool = False,
        prompts: int = 16,
        background: int = 2,
        train_decoder: bool = False,
        box_share: float = 0.5,
        box_noise: float = 0.1,
        name_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        points: int = 12544,
        background_weight: float = 0.1,
        word_weight: float = 0.2,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        check_width(words, towers.embed_dim)
        self.towers = towers
        size = {"in_channels": towers.channels, "embed_dim": towers.embed_dim, "width": width}
        size["token_dim"] = towers.sam.width if mask_token else 0
        self.clip2sam = start_region(Clip2SamAdapter(Clip2SamConfig(**size)), towers)
        self.train_decoder = train_decoder
        if train_decoder:
            answering_parts(towers.sam).requires_grad_(True)
        self.word_losses = WordLosses(words, label_smoothing, background_weight)
        self.prompts, self.background = prompts, background if background_weight else 0
        self.box_share, self.box_noise = box_share, box_noise
        self.name_weight, self.mask_weight, self.dice_weight = name_weight, mask_weight, dice_weight
        self.points, self.word_weight = points, word_weight

    @property
    def decoder(self) -> nn.Module:
        return self.towers.sam.model.mask_decoder

    def published_state(self) -> dict[str, Tensor]:
        state = {f"clip2sam.{name}": tensor for name, tensor in self.clip2sam.state_dict().items()}
        if self.train_decoder:
            state |= {f"sam.model.mask_decoder.{name}": tensor for name, tensor in self.decoder.state_dict().items()}
        return state

    def load_published(self, state: dict[str, Tensor]) -> None:
        parts = {"clip2sam.": self.clip2sam, "sam.model.mask_decoder.": self.decoder}
        for prefix, module in parts.items():
            own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            if own:
                module.load_state_dict(own)

    def forward(self, image: Tensor, masks: Tensor, word_ids: Tensor, known: Tensor) -> dict[str, Tensor]:
        size = image.shape[-1]
        with torch.no_grad():
            features = self.towers.encode_sam(image)
            maps = self.towers.maps(image, features)
            # 1. Prompts: objects, and background.
            everything = masks
            masks, valid, keep = choose_objects(masks, self.prompts, masks.flatten(2).sum(-1) >= LEAST)
            ids = word_ids.gather(1, keep)  # [B, P]
            points = random_points(masks.flatten(0, 1)).view(*ids.shape, 2)
            boxes = jitter_boxes(masks_to_boxes(masks), self.box_noise, float(size))
            nothing = background_prompts(everything, known, self.background)
            boxed = bool(torch.rand(()) < self.box_share)
            prompts = {"input_boxes": torch.cat([boxes, nothing.boxes], 1)}
            if not boxed:
                prompts = {"input_points": torch.cat([points, nothing.points], 1)[:, :, None]}

        # 2. The SAM side segments.
        with torch.set_grad_enabled(self.train_decoder and torch.is_grad_enabled()):
            decoded = self.towers.sam.decode(features, **prompts)
            if self.train_decoder:  # the single-mask token, without the stability rule
                decoded = DecodedMasks(masks=decoded.masks[:, :, :1], tokens=decoded.tokens[:, :, :1])
            else:
                decoded = self.towers.sam.select_masks(decoded, multimask_output=False)

        # 3. The adapter classifies the masks.
        embeds = self.name(maps, decoded, prompts.get("input_boxes"), size)  # [B, P + G, D]
        named = valid & (ids >= 0)
        chosen = torch.cat([named, nothing.valid], 1)  # [B, P + G]
        labels = torch.cat([ids, torch.full_like(nothing.valid, -1, dtype=ids.dtype)], 1)
        name_loss, top1 = self.word_losses.classify(embeds[chosen], labels[chosen])
        objects = embeds[:, : ids.shape[1]][named]
        asked = self.word_losses.known_texts(known)[named.nonzero()[:, 0]]  # [n, V + Kw]
        logits = self.clip2sam.logits(objects[None], self.word_losses.texts)[0]
        word_loss = self.word_losses.word_loss(logits, ids[named], asked)
        loss = self.name_weight * name_loss + self.word_weight * word_loss

        # 4. Mask losses, except for whole-image masks.
        predicted = decoded.masks[:, : ids.shape[1], 0]  # [B, P, h, w]
        metrics = {"name": name_loss.detach(), "word": word_loss.detach(), "top1": top1}
        with_mask = valid & outlined(masks)
        truth = masks[with_mask].float()
        got = predicted[with_mask].float()
        coarse = resize_masks(masks, predicted.shape[-1])[with_mask]
        metrics["iou"] = mask_iou(got.detach(), coarse.float()).sum() / max(len(got), 1)
        if self.train_decoder:
            pixel, dice = point_mask_losses(got, truth, self.points)
            mask_loss = (self.mask_weight * pixel + self.dice_weight * dice).sum() / max(len(got), 1)
            metrics["mask"] = mask_loss.detach()
            loss = loss + mask_loss
        return {"loss": loss, **metrics}

    def name(self, maps: tuple[Tensor, ...], decoded: DecodedMasks, boxes: Tensor | None, size: int) -> Tensor:
        """Class embeddings of prompts [B, P, D]; the region is the box prompt if there is one, as in OVSamModel."""
        predicted = decoded.masks[:, :, 0].detach()  # [B, P, h, w]
        if boxes is None:
            boxes = masks_to_boxes(predicted > 0) * (size / predicted.shape[-1])
        frame = 4 * maps[0].shape[-1]
        probabilities = predicted.float().sigmoid()
        if probabilities.shape[-1] * 4 != frame:  # the input of the adapter has another size
            probabilities = nn.functional.interpolate(probabilities, (frame // 4, frame // 4), mode="area")
        tokens = decoded.tokens[:, :, 0] if self.clip2sam.token is not None else None
        return self.clip2sam(maps, boxes * (frame / size), probabilities, tokens)

    @torch.no_grad()
    def predict(self, image: Tensor, masks: Tensor, word_ids: Tensor, known: Tensor) -> list[Found]:
        """Return the masks of the SAM side for the true boxes, with the base word of highest score."""
        boxes = masks_to_boxes(masks)
        features = self.towers.encode_sam(image)
        decoded = self.towers.sam.decode(features, input_boxes=boxes)
        decoded = self.towers.sam.select_masks(decoded, multimask_output=False)
        embeds = self.name(self.towers.maps(image, features), decoded, boxes, image.shape[-1])
        logits = self.clip2sam.logits(embeds, self.word_losses.texts[: self.word_losses.count])
        scores, best = logits.float().sigmoid().max(-1)
        decoded.iou = scores[..., None]
        return prompted(decoded, masks, self.word_losses.base_ids[best])


def answering_parts(sam: SamSide) -> nn.ModuleList:
    """Return the parameters of a mask decoder that affect the single mask: not image-only layers, other masks,
    scores."""
    decoder = sam.model.mask_decoder
    apart = [*sam.image_layers, "iou_prediction_head", "pred_obj_score_head", "output_hypernetworks_mlps"]
    parts = [module for name, module in decoder.named_children() if name not in apart]
    return nn.ModuleList([*parts, decoder.output_hypernetworks_mlps[0]])


class BackgroundPrompts:
    """Prompts on the background: `points` [B, G, 2], `boxes` [B, G, 4], and whether each is `valid`."""

    def __init__(self, points: Tensor, boxes: Tensor, valid: Tensor):
        self.points, self.boxes, self.valid = points, boxes, valid


def background_prompts(masks: Tensor, known: Tensor, count: int) -> BackgroundPrompts:
    """Draw random background pixels, and boxes around them that overlap no object much; valid only in images annotated
    for all words. masks [B, O, H, W], known [B, W]"""
    b, _, height, width = masks.shape
    free = ~masks.any(1)  # [B, H, W]
    points = random_points(free.repeat_interleave(count, 0)).view(b, count, 2)
    half = torch.rand(b, count, 2, device=masks.device) * 0.2 * width + 4
    boxes = torch.cat([points - half, points + half], -1).clamp(0, float(width))
    objects = masks_to_boxes(masks)
    fit = torch.stack([box_iou(mine, theirs).amax(1) for mine, theirs in zip(boxes, objects, strict=True)])  # [B, G]
    valid = known.all(1)[:, None] & free.flatten(1).any(1)[:, None] & (fit < 0.3)
    return BackgroundPrompts(points, boxes, valid)
