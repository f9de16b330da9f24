"""Stage `sam`: image encoder, prompt encoder and mask decoder, by SAM's scheme (Kirillov et al. 2023, appendix A).

The first prompt is a box or a click, each half the time; further clicks are drawn from the error region, with the
previous mask logits as mask prompt, and there are rounds without a new click, one at a random position and one at the
end. For an ambiguous (first) prompt the best of three masks is trained, for further prompts the single mask. Losses:
focal and Dice loss 20 : 1, and squared error of the predicted IoU. The defaults are those of the paper; the recipes of
ovsam-tiny list their changes.

Two changes make it converge on two cores. Images may be windows of a larger canvas: the decoder gets the position of
the window on the canvas, so that 256 px windows train the 512 px model. A dense auxiliary task (the box of the object
at each pixel) trains the encoder with every pixel; its head is discarded.

In the composition "clip" the features are those of a Sam2ClipAdapter on the maps of a frozen CLIP tower. If the towers
have a ConceptHead, its masks of the prompted objects are the first mask prompts, and mask prompts are added to the
masks, as in OVSamModel: the decoder is trained to correct them, which takes far fewer steps than masks from scratch.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ovsam.errors import InputError
from ovsam.modeling.adapters.sam2clip import Sam2ClipAdapter, Sam2ClipConfig
from ovsam.modeling.outputs import ConceptOutput, DecodedMasks
from ovsam.modeling.sam.base import SamSide
from ovsam.modeling.sam.decode import decode_masks
from ovsam.ops.boxes import masks_to_boxes
from ovsam.ops.masks import add_prior
from ovsam.training.stages.losses import dice_loss, focal_loss, giou_loss, mask_iou
from ovsam.training.stages.predictions import Found, prompted
from ovsam.training.stages.prompts import (
    choose_objects,
    corrective_clicks,
    jitter_boxes,
    pixel_owners,
    random_points,
)
from ovsam.training.stages.towers import Towers

CELL = 16  # the stride of the image embedding
AUX_STRIDE = 8
MASK_STRIDE = 4  # of the decoder's masks


class SamStage(nn.Module):
    """
    Args:
        towers: towers with the SAM side that is trained, with the decoder of SAM 2.
        prompts: number of prompted objects of each image.
        clicks: number of rounds with a corrective click.
        repeats: number of rounds without a new prompt: 2, at a random position and at the end; 1, at the end; 0.
        click_share: share of the steps with these rounds; the others stop after the first prompt.
        box_noise: standard deviation of the sides of a box, relative to its size.
        first, later: weights of the single mask and of the best of three, in the first round and in later ones.
        focal_weight, dice_weight, iou_weight, focal_gamma, focal_alpha: as in the paper; gamma 0 and alpha 0 are
            cross entropy.
        aux_weight: weight of the dense auxiliary task.
        layers, heads: sizes of the transformer of Sam2ClipAdapter, in the composition "clip".
        cache: in the composition "clip", whether to store the maps of the frozen CLIP tower on disk.
        window: in the composition "clip", side in pixels of the random windows of its maps in half of the steps; 0 for
            whole images only.
    """

    def __init__(
        self,
        towers: Towers,
        prompts: int = 64,
        clicks: int = 8,
        repeats: int = 2,
        click_share: float = 1.0,
        box_noise: float = 0.1,
        first: tuple[float, float] = (0.0, 1.0),
        later: tuple[float, float] = (1.0, 0.0),
        focal_weight: float = 20.0,
        dice_weight: float = 1.0,
        iou_weight: float = 1.0,
        focal_gamma: float = 2.0,
        focal_alpha: float = 0.25,
        aux_weight: float = 0.0,
        layers: int = 3,
        heads: int = 8,
        cache: bool = False,
        window: int = 0,
    ):
        super().__init__()
        if repeats not in (0, 1, 2):
            raise InputError(f"repeats is {repeats}; it must be 2 (a random round and the last), 1 (the last) or 0.")
        self.towers = towers
        self.sam.requires_grad_(True)
        if not hasattr(self.sam.model, "no_memory_embedding"):
            raise InputError("The stage sam trains SAM 2 and EdgeTAM, whose decoder reads maps at strides 4 and 8 too.")
        # The object score is for video; here there is always an object.
        self.sam.model.mask_decoder.pred_obj_score_head.requires_grad_(False)
        self.sam.to(memory_format=torch.channels_last)
        self.sam2clip, self.cache, self.window = None, cache, window
        if towers.composition == "clip":
            model = self.sam.model  # some of its parts are replaced by the adapter
            unused = [getattr(model, part) for part in self.sam.encoder_parts]
            unused += [getattr(model.mask_decoder, layer) for layer in self.sam.image_layers]
            unused += [] if towers.concepts is None else [model.prompt_encoder.no_mask_embed]
            for part in unused:
                part.requires_grad_(False)
            size = {"in_channels": towers.channels, "width": self.sam.width}
            self.sam2clip = Sam2ClipAdapter(Sam2ClipConfig(**size, num_layers=layers, num_heads=heads))
        elif cache or window:
            raise InputError('cache and window need composition "clip": the maps of a trained encoder change.')
        self.prompts, self.clicks, self.repeats, self.click_share = prompts, clicks, repeats, click_share
        self.box_noise, self.first, self.later = box_noise, first, later
        self.focal_weight, self.dice_weight, self.iou_weight = focal_weight, dice_weight, iou_weight
        self.focal_gamma, self.focal_alpha, self.aux_weight = focal_gamma, focal_alpha or None, aux_weight
        # Foreground, and distances to the box's four sides.
        self.aux_head = nn.Conv2d(self.sam.pyramid_channels[1], 5, 1) if aux_weight else None

    @property
    def sam(self) -> SamSide:
        return self.towers.sam

    def published_state(self) -> dict[str, Tensor]:
        """Return the weights of a checkpoint, with the names of the whole model."""
        state = {f"sam.{name}": tensor for name, tensor in self.sam.state_dict().items()}
        if self.sam2clip is None:
            return state
        encoder = tuple(f"sam.model.{part}" for part in self.sam.encoder_parts)  # replaced by the adapter
        state = {name: tensor for name, tensor in state.items() if not name.startswith(encoder)}
        return state | {f"sam2clip.{name}": tensor for name, tensor in self.sam2clip.state_dict().items()}

    def load_published(self, state: dict[str, Tensor]) -> None:
        own = {name.removeprefix("sam."): tensor for name, tensor in state.items() if name.startswith("sam.")}
        self.sam.load_state_dict(own, strict=self.sam2clip is None)
        if self.sam2clip is not None:
            adapter = {n.removeprefix("sam2clip."): t for n, t in state.items() if n.startswith("sam2clip.")}
            self.sam2clip.load_state_dict(adapter)

    def prepare(self, data: Dataset, folder: Path, data_key: str) -> Dataset:
        """Return the training set, with the cached maps of every sample if there is a cache."""
        return self.towers.keep_maps(data, folder, data_key) if self.cache else data

    def encode(self, image: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Images [B, 3, S, S] -> embedding, the finer maps that the decoder reads, the pyramid's map at stride 8."""
        model, decoder = self.sam.model, self.sam.model.mask_decoder
        stride4, stride8, stride16 = model.vision_encoder(self.towers.sam_pixels(image)).fpn_hidden_states
        high_res = (decoder.conv_s0(stride4), decoder.conv_s1(stride8))
        return stride16 + model.no_memory_embedding[0, 0, :, None, None], high_res, stride8

    def forward(
        self, image: Tensor, masks: Tensor, word_ids: Tensor, known: Tensor, **kept: Tensor
    ) -> dict[str, Tensor]:
        # 1. Encode the image, or a window of CLIP's maps of it.
        model, decoder = self.sam.model, self.sam.model.mask_decoder
        size, concepts = image.shape[-1], None
        if self.sam2clip is None:
            embedding, high_res, stride8 = self.encode(image)
        else:
            with torch.no_grad():
                maps = self.towers.maps(image, kept=kept)
                if self.window and torch.rand(()) < 0.5:
                    size = self.window
                    maps, masks = random_window(maps, masks, size)
                concepts = None if self.towers.concepts is None else self.towers.concepts(maps)
            features = self.sam2clip(maps)
            embedding, high_res, stride8 = features.embedding, features.high_res, features.pyramid[1]

        # 2. Choose `prompts` visible objects of each image; if there are fewer, the rest has weight zero.
        everything = masks
        masks, valid, _ = choose_objects(masks, self.prompts)  # [B, P, H, W], [B, P]
        valid = valid.float()
        target = (F.avg_pool2d(masks.float(), 4) > 0.5).float()  # [B, P, H/4, W/4]

        # 3. The position of the window on the canvas: prompts are shifted, and the position encoding is cropped.
        cells = size // CELL
        x, y = (int(v) for v in torch.randint(0, (self.sam.image_size - size) // CELL + 1, (2,)))
        position = model.get_image_wide_positional_embeddings()[..., y : y + cells, x : x + cells]
        offset = torch.tensor([x, y], device=image.device) * float(CELL)

        # 4. The rounds. One kind of first prompt per step, so that the decoder gets the same tokens as in inference.
        b, p = valid.shape
        kind = "box" if torch.rand(()) < 0.5 else "click"
        if kind == "box":
            points = jitter_boxes(masks_to_boxes(masks), self.box_noise, float(size)).view(b, p, 2, 2)
            labels = torch.tensor([2, 3], device=image.device).expand(b, p, 2)
        else:
            points = random_points(masks.flatten(0, 1)).view(b, p, 1, 2)
            labels = torch.ones(b, p, 1, dtype=torch.long, device=image.device)
        prior = None if concepts is None else self.concept_masks(concepts, points, labels, size)  # [B, P, H/4, W/4]
        if prior is None:
            dense = model.prompt_encoder.no_mask_embed.weight[0][None, None, :, None, None]
        else:
            dense = self.embed_masks(prior)
        plan = self.plan()
        loss, previous, metrics = image.new_zeros((), dtype=torch.float32), target, {}
        for step, clicked in enumerate(plan):
            if step:  # 4a. Correct the previous mask, which becomes the mask prompt.
                if clicked:
                    click, label = corrective_clicks(previous > 0, target > 0, size)
                    points, labels = torch.cat([points, click], 2), torch.cat([labels, label], 2)
                dense = self.embed_masks(previous)
            out = decode_masks(decoder, embedding, position, high_res, self.embed(points + offset, labels), dense)
            if prior is not None:  # as in OVSamModel, whose masks are this sum
                out.masks = add_prior(out.masks, previous if step else prior)
            weights = self.later if step else self.first
            loss = loss + self.mask_losses(out, target, valid, weights) / len(plan)
            previous = going_on(out, weights)
            if step in (0, 1, len(plan) - 1):
                iou = (mask_iou(previous, target) * valid).sum() / valid.sum().clamp(min=1)
                metrics[f"iou_{kind}_{step + 1}"] = iou

        # 5. The dense auxiliary task.
        if self.aux_head is not None:
            aux = self.aux_loss(self.aux_head(stride8), everything)
            metrics["aux"] = aux.detach()
            loss = loss + self.aux_weight * aux
        return {"loss": loss, **metrics}

    @torch.no_grad()
    def concept_masks(self, concepts: ConceptOutput, points: Tensor, labels: Tensor, size: int) -> Tensor:
        """The masks of the ConceptHead for boxes (labels 2 and 3) or clicks, as in OVSamModel, [B, P, H/4, W/4]."""
        head = self.towers.concepts
        if int(labels[0, 0, 0]) == 2:
            masks = head.box_masks(concepts, points.flatten(2), size)  # boxes [B, P, 2, 2] -> [B, P, 4]
        else:
            masks, _ = head.point_masks(concepts, points, labels, size)
        return F.adaptive_avg_pool2d(masks, size // MASK_STRIDE)

    def embed_masks(self, masks: Tensor) -> Tensor:
        """Mask logits [B, P, H/4, W/4] -> dense prompts [B, P, C, H/16, W/16]."""
        dense = self.sam.model.prompt_encoder.mask_embed(masks.flatten(0, 1)[:, None])  # -> [B*P, C, h, w]
        return dense.unflatten(0, masks.shape[:2])

    def plan(self) -> list[bool]:
        """Return the rounds of a step: whether each has a new prompt."""
        if torch.rand(()) >= self.click_share:
            return [True]
        rounds = [True] * (1 + self.clicks)
        if self.repeats == 2:
            rounds.insert(1 + int(torch.randint(0, self.clicks + 1, ())), False)
        return rounds + [False] * (self.repeats > 0)

    def embed(self, points: Tensor, labels: Tensor) -> Tensor:
        """Points [B, P, N, 2] with labels 0 / 1 (clicks), 2 / 3 (box corners) or -1 (none) -> [B, P, N + 1, C]; the
        last token is SAM's padding point, which also replaces missing points."""
        encoder = self.sam.model.prompt_encoder
        with torch.autocast(points.device.type, enabled=False):  # bfloat16 is too coarse for Fourier features
            code = encoder.shared_embedding(points + 0.5, (self.sam.image_size, self.sam.image_size))
            code = code + encoder.point_embed(labels.clamp(min=0))
        none = encoder.not_a_point_embed.weight  # [1, C]
        code = torch.where(labels[..., None] < 0, none, code)
        return torch.cat([code, none.expand(*code.shape[:2], 1, -1)], 2)

    def mask_losses(self, out: DecodedMasks, target: Tensor, valid: Tensor, weights: tuple[float, float]) -> Tensor:
        """Losses of the single mask and the best of three (SAM's minimum), and of the predicted IoU of trained
        masks."""
        single, three = weights
        learning = slice(0 if single else 1, None if three else 1)
        target = target[:, :, None].expand_as(out.masks)
        pixel = focal_loss(out.masks, target, self.focal_gamma, self.focal_alpha).mean((-1, -2))
        each = self.focal_weight * pixel + self.dice_weight * dice_loss(out.masks, target)  # [B, P, M]
        quality = (out.iou - mask_iou(out.masks, target)).square()[..., learning].mean(-1)
        total = single * each[..., 0] + three * each[..., 1:].amin(-1) + self.iou_weight * quality
        return (total * valid).sum() / valid.sum().clamp(min=1)

    def aux_loss(self, prediction: Tensor, masks: Tensor) -> Tensor:
        """Loss of each pixel at stride 8: presence of an object, and the sides of its box (GIoU)."""
        boxes = masks_to_boxes(masks)  # [B, O, 4]
        owner = pixel_owners(masks, AUX_STRIDE)  # [B, h, w]
        foreground = owner >= 0
        loss = F.binary_cross_entropy_with_logits(prediction[:, 0], foreground.float())
        batch, y, x = foreground.nonzero(as_tuple=True)
        truth = boxes[batch, owner[batch, y, x]]
        center = torch.stack([x, y], -1) * float(AUX_STRIDE) + AUX_STRIDE / 2
        sides = prediction[batch, 1:, y, x].clamp(max=6).exp() * 16  # distances left, top, right, bottom in pixels
        predicted = torch.cat([center - sides[:, :2], center + sides[:, 2:]], -1)
        return loss + giou_loss(predicted, truth)[0].mean()

    @torch.no_grad()
    def predict(self, image: Tensor, masks: Tensor, word_ids: Tensor, known: Tensor) -> list[Found]:
        """Return the masks of the true boxes, on images of the model's size or windows in the corner of the canvas."""
        window = image.shape[-1]
        if self.sam2clip is None:
            canvas = F.pad(self.towers.sam_pixels(image), (0, self.sam.image_size - window) * 2)
            features = self.sam.encode(canvas)
        else:
            features = self.sam2clip(self.towers.maps(image))
        decoded = self.sam.decode(features, input_boxes=masks_to_boxes(masks))
        cells = window // 4
        decoded.masks = decoded.masks[..., :cells, :cells]
        return prompted(decoded, masks, word_ids)


def random_window(maps: tuple[Tensor, ...], masks: Tensor, size: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Crop the same random square from the four maps [B, Ci, hi, wi] and the masks [B, O, S, S]; `size` is its side in
    pixels, a multiple of 32. Features near the border still depend on pixels outside."""
    x, y = (32 * int(v) for v in torch.randint(0, (masks.shape[-1] - size) // 32 + 1, (2,)))

    def cut(tensor: Tensor, stride: int) -> Tensor:
        return tensor[..., y // stride : (y + size) // stride, x // stride : (x + size) // stride]

    return tuple(cut(feature, stride) for feature, stride in zip(maps, (4, 8, 16, 32), strict=True)), cut(masks, 1)


def going_on(out: DecodedMasks, weights: tuple[float, float]) -> Tensor:
    """Return the mask that is corrected and becomes the mask prompt [B, P, h, w]: the single one if it is trained, else
    the one of the three with the highest predicted IoU."""
    if weights[0]:
        return out.masks[:, :, 0].detach()
    best = 1 + out.iou[..., 1:].argmax(-1)[..., None, None, None]  # [B, P, 1, 1, 1]
    return out.masks.take_along_dim(best, 2)[:, :, 0].detach()
