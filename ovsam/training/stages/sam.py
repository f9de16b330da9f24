"""Stage `sam`: image encoder, prompt encoder and mask decoder, by SAM's scheme (Kirillov et al. 2023, appendix A).

A box or a click, each half the time; then clicks drawn from the error region, with the previous mask's logits fed back;
and rounds without a new click, one at a random place and one at the end. An ambiguous prompt (the first) is answered by
three masks, of which the best one learns; more prompts by the single mask. Focal and Dice loss 20 : 1, and the
predicted IoU by squared error. The defaults are the paper's; the recipes of ovsam-tiny say where they differ.

Two things make it converge on two cores. Pictures may be windows of a larger canvas: the decoder is told where on the
full canvas a window lies, so 256 px windows train the 512 px model. And a dense side task (which object's box does this
pixel belong to?) teaches the encoder about objects from every pixel at once; its head is thrown away.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsam.errors import InputError
from ovsam.modeling.outputs import DecodedMasks
from ovsam.modeling.sam.decode import decode_masks
from ovsam.ops.boxes import masks_to_boxes
from ovsam.training.stages.losses import dice_loss, focal_loss, giou_loss, mask_iou
from ovsam.training.stages.predictions import Found, prompted
from ovsam.training.stages.prompts import choose_objects, corrective_clicks, jitter_boxes, pixel_owners, random_points
from ovsam.training.stages.towers import Towers

CELL = 16  # the stride of the image embedding
AUX_STRIDE = 8


class SamStage(nn.Module):
    """
    Args:
        towers: with the SAM side that learns, of SAM 2's kind.
        prompts: objects of each picture that are prompted.
        clicks: rounds with a corrective click.
        repeats: rounds without a new prompt: 2, at a random place and at the end; 1, at the end; 0.
        click_share: share of the steps that have those rounds; the others stop after the first prompt.
        box_noise: deviation of a box's sides, in parts of its size.
        first, later: weights of the single mask and of the best of three, in the first round and in later ones.
        focal_weight, dice_weight, iou_weight, focal_gamma, focal_alpha: as in the paper; gamma 0 and alpha 0 are
            cross entropy.
        aux_weight: of the dense side task.
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
    ):
        super().__init__()
        if repeats not in (0, 1, 2):
            raise InputError(f"repeats is {repeats}; one round at a random place, one at the end, or fewer.")
        self.sam = towers.sam.requires_grad_(True)
        if not hasattr(self.sam.model, "no_memory_embedding"):
            raise InputError("The stage sam trains SAM 2 and EdgeTAM, whose decoder reads maps at strides 4 and 8 too.")
        # Whether there is an object at all is a question of video; here there always is.
        self.sam.model.mask_decoder.pred_obj_score_head.requires_grad_(False)
        self.sam.to(memory_format=torch.channels_last)
        self.sam_pixels = towers.sam_pixels
        self.prompts, self.clicks, self.repeats, self.click_share = prompts, clicks, repeats, click_share
        self.box_noise, self.first, self.later = box_noise, first, later
        self.focal_weight, self.dice_weight, self.iou_weight = focal_weight, dice_weight, iou_weight
        self.focal_gamma, self.focal_alpha, self.aux_weight = focal_gamma, focal_alpha or None, aux_weight
        # Foreground, and distances to the box's four sides.
        self.aux_head = nn.Conv2d(self.sam.pyramid_channels[1], 5, 1) if aux_weight else None

    def published_state(self) -> dict[str, Tensor]:
        """What goes into a checkpoint, under the whole model's names."""
        return {f"sam.{name}": tensor for name, tensor in self.sam.state_dict().items()}

    def load_published(self, state: dict[str, Tensor]) -> None:
        own = {name.removeprefix("sam."): tensor for name, tensor in state.items() if name.startswith("sam.")}
        self.sam.load_state_dict(own)

    def forward(self, image: Tensor, masks: Tensor, word_ids: Tensor, known: Tensor) -> dict[str, Tensor]:
        # 1. Encode the window.
        model, decoder = self.sam.model, self.sam.model.mask_decoder
        stride4, stride8, stride16 = model.vision_encoder(self.sam_pixels(image)).fpn_hidden_states
        high_res = (decoder.conv_s0(stride4), decoder.conv_s1(stride8))
        embedding = stride16 + model.no_memory_embedding[0, 0, :, None, None]

        # 2. Choose `prompts` visible objects of each picture; if there are fewer, the rest weigh nothing.
        everything = masks
        masks, valid, _ = choose_objects(masks, self.prompts)  # [B, P, H, W], [B, P]
        valid = valid.float()
        target = (F.avg_pool2d(masks.float(), 4) > 0.5).float()  # [B, P, H/4, W/4]

        # 3. The window's place on the canvas: prompts are shifted, and the position code is cut out there.
        size = image.shape[-1]
        cells = size // CELL
        x, y = (int(v) for v in torch.randint(0, (self.sam.image_size - size) // CELL + 1, (2,)))
        position = model.get_image_wide_positional_embeddings()[..., y : y + cells, x : x + cells]
        offset = torch.tensor([x, y], device=image.device) * float(CELL)

        # 4. The rounds. One kind of first prompt per step, so that the decoder sees exactly the tokens it will be given
        # in use.
        b, p = valid.shape
        kind = "box" if torch.rand(()) < 0.5 else "click"
        if kind == "box":
            points = jitter_boxes(masks_to_boxes(masks), self.box_noise, float(size)).view(b, p, 2, 2)
            labels = torch.tensor([2, 3], device=image.device).expand(b, p, 2)
        else:
            points = random_points(masks.flatten(0, 1)).view(b, p, 1, 2)
            labels = torch.ones(b, p, 1, dtype=torch.long, device=image.device)
        dense = model.prompt_encoder.no_mask_embed.weight[0][None, None, :, None, None]
        plan = self.plan()
        loss, previous, metrics = image.new_zeros((), dtype=torch.float32), target, {}
        for step, clicked in enumerate(plan):
            if step:  # 4a. Correct the previous mask, and feed it back.
                if clicked:
                    click, label = corrective_clicks(previous > 0, target > 0, size)
                    points, labels = torch.cat([points, click], 2), torch.cat([labels, label], 2)
                dense = model.prompt_encoder.mask_embed(previous.flatten(0, 1)[:, None])  # -> [B*P, C, h, w]
                dense = dense.view(b, p, *dense.shape[1:])
            out = decode_masks(decoder, embedding, position, high_res, self.embed(points + offset, labels), dense)
            weights = self.later if step else self.first
            loss = loss + self.mask_losses(out, target, valid, weights) / len(plan)
            previous = going_on(out, weights)
            if step in (0, 1, len(plan) - 1):
                iou = (mask_iou(previous, target) * valid).sum() / valid.sum().clamp(min=1)
                metrics[f"iou_{kind}_{step + 1}"] = iou

        # 5. The dense side task.
        if self.aux_head is not None:
            aux = self.aux_loss(self.aux_head(stride8), everything)
            metrics["aux"] = aux.detach()
            loss = loss + self.aux_weight * aux
        return {"loss": loss, **metrics}

    def plan(self) -> list[bool]:
        """The rounds of a step: whether each brings a new prompt."""
        if torch.rand(()) >= self.click_share:
            return [True]
        rounds = [True] * (1 + self.clicks)
        if self.repeats == 2:
            rounds.insert(1 + int(torch.randint(0, self.clicks + 1, ())), False)
        return rounds + [False] * (self.repeats > 0)

    def embed(self, points: Tensor, labels: Tensor) -> Tensor:
        """Points [B, P, N, 2] with labels 0 / 1 (clicks), 2 / 3 (box corners) or -1 (none) -> [B, P, N + 1, C]; the
        last token is SAM's padding point, which also stands for a point that is none."""
        encoder = self.sam.model.prompt_encoder
        with torch.autocast(points.device.type, enabled=False):  # bfloat16 blurs Fourier codes
            code = encoder.shared_embedding(points + 0.5, (self.sam.image_size, self.sam.image_size))
            code = code + encoder.point_embed(labels.clamp(min=0))
        none = encoder.not_a_point_embed.weight  # [1, C]
        code = torch.where(labels[..., None] < 0, none, code)
        return torch.cat([code, none.expand(*code.shape[:2], 1, -1)], 2)

    def mask_losses(self, out: DecodedMasks, target: Tensor, valid: Tensor, weights: tuple[float, float]) -> Tensor:
        """The single mask and the best of three (SAM's minimum), and the predicted IoU of the masks that learn."""
        single, three = weights
        learning = slice(0 if single else 1, None if three else 1)
        target = target[:, :, None].expand_as(out.masks)
        pixel = focal_loss(out.masks, target, self.focal_gamma, self.focal_alpha).mean((-1, -2))
        each = self.focal_weight * pixel + self.dice_weight * dice_loss(out.masks, target)  # [B, P, M]
        quality = (out.iou - mask_iou(out.masks, target)).square()[..., learning].mean(-1)
        total = single * each[..., 0] + three * each[..., 1:].amin(-1) + self.iou_weight * quality
        return (total * valid).sum() / valid.sum().clamp(min=1)

    def aux_loss(self, prediction: Tensor, masks: Tensor) -> Tensor:
        """Per pixel at stride 8: is there an object, and where are its box's sides (GIoU)."""
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
        """The masks of the true boxes, on pictures of the model's own size or windows in the canvas's corner."""
        window = image.shape[-1]
        canvas = F.pad(self.sam_pixels(image), (0, self.sam.image_size - window) * 2)
        decoded = self.sam.decode(self.sam.encode(canvas), input_boxes=masks_to_boxes(masks))
        cells = window // 4
        decoded.masks = decoded.masks[..., :cells, :cells]
        return prompted(decoded, masks, word_ids)


def going_on(out: DecodedMasks, weights: tuple[float, float]) -> Tensor:
    """The mask that is corrected and fed back [B, P, h, w]: the single one where it learns, else the one of the three
    that the decoder itself thinks best."""
    if weights[0]:
        return out.masks[:, :, 0].detach()
    best = 1 + out.iou[..., 1:].argmax(-1)[..., None, None, None]  # [B, P, 1, 1, 1]
    return out.masks.take_along_dim(best, 2)[:, :, 0].detach()
