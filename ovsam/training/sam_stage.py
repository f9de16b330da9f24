"""Stage `sam`: image encoder, prompt encoder and mask decoder from scratch, by SAM's scheme (Kirillov et al. 2023,
appendix A): boxes and clicks, then corrective clicks drawn from the error region, with the previous mask fed back.

Two things make it converge on two cores. Pictures are windows of a larger canvas: the decoder is told where on the
full canvas a window lies, so 256 px windows train the 512 px model. And a dense side task (which object's box does this
pixel belong to?) teaches the encoder about objects from every pixel at once; its head is thrown away.
"""

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import EdgeTamConfig, EdgeTamModel

from ovsam.boxes import masks_to_boxes
from ovsam.sam.decode import decode_masks

from .losses import dice_loss, focal_loss, giou_loss, mask_iou
from .targets import jitter_boxes, object_masks, random_points

CELL = 16  # the stride of the image embedding
AUX_STRIDE = 8


def edgetam_config(architecture: str, channels: list[int], width: int, mlp_dim: int, image_size: int) -> EdgeTamConfig:
    """An EdgeTAM of any width over any timm trunk with maps at strides 4, 8, 16, 32 (`channels`, in that order)."""
    grid = image_size // CELL
    backbone = {
        "model_type": "timm_wrapper",
        "architecture": architecture,
        "num_classes": 0,
        "model_args": {"in_chans": 3, "features_only": True, "out_indices": [1, 2, 3, 4]},
    }
    return EdgeTamConfig(
        vision_config={
            "model_type": "edgetam_vision_model",
            "backbone_config": backbone,
            "backbone_channel_list": channels[::-1],
            "backbone_feature_sizes": [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2],
            "fpn_hidden_size": width,
            "fpn_top_down_levels": [0, 1, 2, 3],
        },
        prompt_encoder_config={"hidden_size": width, "image_size": image_size},
        mask_decoder_config={"hidden_size": width, "mlp_dim": mlp_dim, "iou_head_hidden_dim": width},
    )


def init_from_scratch(model: EdgeTamModel) -> None:
    """Every layer's own initialisation instead of transformers' normal(0.02), which learns prompts far more slowly;
    and one position encoding for prompts and image, which transformers draws twice."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.LayerNorm | nn.Embedding):
            module.reset_parameters()
    wrapper = model.vision_encoder.backbone.config
    trunk = timm.create_model(wrapper.architecture, pretrained=False, **wrapper.model_args)
    model.vision_encoder.backbone.timm_model.load_state_dict(trunk.state_dict())
    # Between prompts and image, keys start as queries' twins: then similarity of position codes alone makes a prompt
    # and the pixels near it attend to each other from the first step, instead of that being discovered.
    transformer = model.mask_decoder.transformer
    crossings = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        crossings += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in crossings:
        nn.init.orthogonal_(attention.q_proj.weight, gain=1.5)
        attention.k_proj.weight.data.copy_(attention.q_proj.weight)
        nn.init.zeros_(attention.q_proj.bias)
        nn.init.zeros_(attention.k_proj.bias)
    # Position codes: SAM's frequencies (sigma 1) blur over four cells of a 32 x 32 grid. Drawing sigma between 1 and 4
    # keeps the long range and makes neighbouring cells distinct.
    code = model.prompt_encoder.shared_embedding.positional_embedding
    code.mul_(4 ** torch.rand(code.shape[1]))
    model.shared_image_embedding.positional_embedding.copy_(code)


class SamStage(nn.Module):
    def __init__(
        self,
        model: dict,
        prompts: int,
        focal_gamma: float,
        mask_weight: float,
        dice_weight: float,
        trunk_weights: str | None = None,
    ):
        super().__init__()
        self.sam = EdgeTamModel(edgetam_config(**model))
        init_from_scratch(self.sam)
        if trunk_weights is not None:  # a trunk that knows pictures already: the clip stage's, of the same architecture
            prefix = "clip.vision_model."
            state = load_file(trunk_weights)
            trunk = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            self.sam.vision_encoder.backbone.timm_model.load_state_dict(trunk)
        self.sam.to(memory_format=torch.channels_last)
        self.aux_head = nn.Conv2d(model["width"], 5, 1)  # foreground, and distances to the box's four sides
        self.canvas = model["image_size"]
        self.prompts = prompts
        self.focal_gamma, self.mask_weight, self.dice_weight = focal_gamma, mask_weight, dice_weight
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None] * 255, persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None] * 255, persistent=False)

    def published_state(self) -> dict[str, Tensor]:
        """What goes into a checkpoint, under the whole model's names."""
        return {f"sam.model.{name}": tensor for name, tensor in self.sam.state_dict().items()}

    def load_published(self, state: dict[str, Tensor]) -> None:
        self.sam.load_state_dict({name.removeprefix("sam.model."): tensor for name, tensor in state.items()})

    def forward(self, image: Tensor, index_map: Tensor, word_ids: Tensor) -> dict[str, Tensor]:
        # 1. Encode the window.
        pixels = ((image.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        stride4, stride8, stride16 = self.sam.vision_encoder(pixels).fpn_hidden_states
        decoder = self.sam.mask_decoder
        high_res = (decoder.conv_s0(stride4), decoder.conv_s1(stride8))
        embedding = stride16 + self.sam.no_memory_embedding[0, 0, :, None, None]

        # 2. Choose `prompts` visible objects of each picture.
        masks = object_masks(index_map, word_ids.shape[1])  # [B, O, H, W]
        visible = masks.flatten(2).sum(-1) >= 64  # [B, O]
        keep = (torch.rand(visible.shape, device=visible.device) + visible).topk(self.prompts, dim=1).indices
        valid = visible.gather(1, keep).float()  # [B, P]; the rest weigh nothing
        masks = masks.gather(1, keep[:, :, None, None].expand(-1, -1, *masks.shape[2:]))  # [B, P, H, W]
        boxes = masks_to_boxes(masks)
        target = (F.avg_pool2d(masks.float(), 4) > 0.5).float()  # [B, P, H/4, W/4]

        # 3. The window's place on the canvas: prompts are shifted, and the position code is cut out there.
        size = image.shape[-1]
        cells = size // CELL
        x, y = (int(v) for v in torch.randint(0, (self.canvas - size) // CELL + 1, (2,)))
        position = self.sam.get_image_wide_positional_embeddings()[..., y : y + cells, x : x + cells]
        offset = torch.tensor([x, y], device=image.device) * float(CELL)

        # 4. Round 1: a box or a click each. Round 2, every other step: a corrective click and the last mask as well.
        # One kind per step, so that the decoder sees exactly the tokens it will be given in use.
        b, p = valid.shape
        kind = "box" if torch.rand(()) < 0.5 else "click"
        if kind == "box":
            coordinates = (jitter_boxes(boxes, 0.05, float(size))).view(b, p, 2, 2) + offset
            labels = torch.tensor([2, 3], device=image.device).expand(b, p, 2)
        else:
            coordinates = random_points(masks.flatten(0, 1)).view(b, p, 1, 2) + offset
            labels = torch.ones(b, p, 1, dtype=torch.long, device=image.device)
        dense = self.sam.prompt_encoder.no_mask_embed.weight[0][None, None, :, None, None]
        loss, metrics = image.new_zeros((), dtype=torch.float32), {}
        rounds = 1 + int(torch.rand(()) < 0.5)
        for step in range(rounds):
            sparse = self.embed(coordinates, labels)
            out = decode_masks(decoder, embedding, position, high_res, sparse, dense)
            loss = loss + self.mask_losses(out, target, valid) / rounds
            iou = (mask_iou(out.masks[:, :, 0], target) * valid).sum().detach() / valid.sum().clamp(min=1)
            metrics[f"iou_{kind}_{step + 1}"] = iou
            if step + 1 < rounds:
                previous = out.masks[:, :, 0].detach()
                errors = (previous > 0) != (target > 0)
                clicks = random_points(errors.flatten(0, 1)).view(b, p, 1, 2)
                missed = target.flatten(2).gather(2, (clicks[..., 1] * target.shape[-1] + clicks[..., 0]).long())
                coordinates = torch.cat([coordinates, clicks * 4 + 1.5 + offset], 2)
                labels = torch.cat([labels, (missed > 0).long()], 2)
                dense = self.sam.prompt_encoder.mask_embed(previous.flatten(0, 1)[:, None])  # [B*P, C, h, w]
                dense = dense.view(b, p, *dense.shape[1:])

        # 5. The dense side task.
        aux = self.aux_loss(self.aux_head(stride8), index_map, word_ids.shape[1])
        metrics["aux"] = aux.detach()
        return {"loss": loss + 0.5 * aux, **metrics}

    def embed(self, coordinates: Tensor, labels: Tensor) -> Tensor:
        """Points [B, P, N, 2] with labels 0 / 1 (clicks) or 2 / 3 (box corners) -> [B, P, N + 1, C]; the last token is
        SAM's padding point."""
        encoder = self.sam.prompt_encoder
        with torch.autocast(coordinates.device.type, enabled=False):  # bfloat16 blurs Fourier codes
            code = encoder.shared_embedding(coordinates + 0.5, (self.canvas, self.canvas)) + encoder.point_embed(labels)
        return torch.cat([code, encoder.not_a_point_embed.weight.expand(*code.shape[:2], 1, -1)], 2)

    def mask_losses(self, out, target: Tensor, valid: Tensor) -> Tensor:
        """Token 0 always, the best of tokens 1-3 as well (SAM's minimum), and the predicted IoU of all four."""
        target = target[:, :, None].expand_as(out.masks)
        pixel = focal_loss(out.masks, target, self.focal_gamma).mean((-1, -2))
        each = self.mask_weight * pixel + self.dice_weight * dice_loss(out.masks, target)  # [B, P, M]
        quality = (out.iou - mask_iou(out.masks, target)).square().mean(-1)
        total = each[..., 0] + 0.5 * each[..., 1:].amin(-1) + quality
        return (total * valid).sum() / valid.sum().clamp(min=1)

    def aux_loss(self, prediction: Tensor, index_map: Tensor, objects: int) -> Tensor:
        """Per pixel at stride 8: is there an object, and where are its box's sides (GIoU)."""
        masks = object_masks(index_map, objects)
        boxes = masks_to_boxes(masks)  # [B, O, 4]
        owner = index_map[:, AUX_STRIDE // 2 :: AUX_STRIDE, AUX_STRIDE // 2 :: AUX_STRIDE].long()  # [B, h, w]
        foreground = owner > 0
        loss = F.binary_cross_entropy_with_logits(prediction[:, 0], foreground.float())
        batch, y, x = foreground.nonzero(as_tuple=True)
        truth = boxes[batch, owner[batch, y, x] - 1]
        center = torch.stack([x, y], -1) * float(AUX_STRIDE) + AUX_STRIDE / 2
        sides = prediction[batch, 1:, y, x].clamp(max=6).exp() * 16  # distances left, top, right, bottom in pixels
        predicted = torch.cat([center - sides[:, :2], center + sides[:, 2:]], -1)
        return loss + giou_loss(predicted, truth)[0].mean()
