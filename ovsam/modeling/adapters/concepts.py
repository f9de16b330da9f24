"""ConceptHead: objectness, box and class embedding of every location of an image, and the mask of any box, without
queries.

It combines DenseCLIP (dense CLIP scores), FCOS (boxes of locations) and Mask R-CNN (masks of boxes). Text queries come
later, as one matrix product, so any number of them costs about the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ovsam.modeling.adapters.common import AdapterModel, RegionProjection, TopDown, upsample
from ovsam.modeling.adapters.mask_head import MaskHead, mask_regions
from ovsam.modeling.geometry import boxes_to_clip
from ovsam.modeling.locations import agreement, pointed_locations
from ovsam.modeling.outputs import ConceptOutput
from ovsam.modeling.remote_code import RemoteCodeConfig
from ovsam.ops.masks import certainty, paste

CANDIDATES = 16  # locations whose masks are compared for clicks
CERTAINTY = 6.0  # exponent of the certainty of a mask in that comparison


class ConceptHeadConfig(RemoteCodeConfig):
    """Configuration of ConceptHead.

    Args:
        in_channels: channels of the maps at strides 4, 8, 16 and 32.
        embed_dim: D.
        width: width of the head.
        strides: strides of the locations, the finest first; each is twice the one before, and the last is 32.
        mask_width: width of the mask head.
        mask_stride: stride of the masks that the head returns, in pixels: 2 preserves the outlines of small objects.
    """

    model_type = "ovsam_concepts"
    auto_classes = {"AutoModel": "ConceptHead"}

    in_channels: list | tuple = (32, 64, 96, 960)
    embed_dim: int = 384
    width: int = 128
    strides: list | tuple = (16, 32)
    mask_width: int = 96
    mask_stride: int = 4


class ConceptHead(AdapterModel):
    config: ConceptHeadConfig
    base_model_prefix = "concepts"

    def __init__(self, config: ConceptHeadConfig):
        super().__init__(config)
        width, channels = config.width, tuple(config.in_channels)
        self.region = RegionProjection(channels, config.embed_dim)
        self.pyramid = TopDown(channels[-len(config.strides) :], width)
        self.tower = nn.Sequential(*self._block(width, width), *self._block(width, width))
        self.objectness = nn.Conv2d(width, 1, 1)
        self.sides = nn.Conv2d(width, 4, 1)
        self.embedding = nn.Sequential(*self._block(width, 2 * width), nn.Conv2d(2 * width, config.embed_dim, 1))
        self.scale_shift = nn.Conv2d(2 * width, 2, 1)
        self.mask_head = MaskHead(channels, config.mask_width)
        self.post_init()

    @staticmethod
    def _block(channels: int, out: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(8, out), nn.ReLU()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.objectness:  # low at first, as in RetinaNet
            init.constant_(module.bias, -3.0)
        elif module is self.scale_shift:  # probability 0.5 at a cosine of 0.7
            init.zeros_(module.weight)
            init.copy_(module.bias, torch.tensor([15.0, -0.7]))
        elif module is self.embedding[-1]:  # starts as the tower's own embedding
            init.zeros_(module.weight)

    def forward(self, maps: tuple[Tensor, ...]) -> ConceptOutput:
        """maps: features at strides 4, 8, 16, 32, each [B, Ci, hi, wi]."""
        strides = self.config.strides
        levels = self.pyramid(maps[-len(strides) :])
        region = self.region(maps)  # [B, D, H/16, W/16]
        regions = {8: upsample(region), 16: region, 32: F.avg_pool2d(region, 2)}
        per_level = [
            self._locations(feature, regions[stride], stride) for feature, stride in zip(levels, strides, strict=True)
        ]
        objectness, boxes, embeds, scale_shift = (torch.cat(part, dim=1) for part in zip(*per_level, strict=True))
        scale, shift = scale_shift.float().unbind(-1)
        return ConceptOutput(
            objectness=objectness[..., 0],
            boxes=boxes,
            embeds=F.normalize(embeds, dim=-1),
            logit_scale=F.elu(scale[..., None]) + 1,
            logit_shift=shift[..., None],
            mask_features=self.mask_head.features(maps),
        )

    def box_masks(self, concepts: ConceptOutput, boxes: Tensor, side: int, frame: Tensor | None = None) -> Tensor:
        """The masks of boxes.

        Args:
            concepts: output of `forward`.
            boxes: [B, P, 4] xyxy in pixels of the model input.
            side: width and height of the model input in pixels.
            frame: maps the model input to the input of the maps where they differ (see geometry.py).

        Returns:
            mask logits [B, P, side / mask_stride, side / mask_stride] over the model input, EMPTY outside the regions.
        """
        regions, stride = mask_regions(boxes.float()), self.config.mask_stride
        logits = self.mask_head(concepts.mask_features, boxes_to_clip(regions, frame))[-1]
        return paste(logits, regions / stride, (side // stride, side // stride))

    def point_masks(
        self, concepts: ConceptOutput, points: Tensor, labels: Tensor, side: int, frame: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The masks of clicks: of the best locations for them, the one whose mask agrees best with all clicks and is
        most certain. Logits are 0 everywhere if no location fits.

        Args:
            concepts, side, frame: see `box_masks`; the boxes of the locations are in pixels of the model input.
            points: [B, P, N, 2] xy in pixels of the model input; labels: [B, P, N], 1 inside, 0 outside; others are
                ignored.

        Returns:
            mask logits as in `box_masks`, and their probability to agree with all clicks [B, P].
        """
        index, fit = pointed_locations(concepts, points, labels, CANDIDATES)  # [B, P, k]
        boxes = concepts.boxes.take_along_dim(index.flatten(1)[..., None], 1)  # [B, P*k, 4]
        regions = mask_regions(boxes.float())
        logits = self.mask_head(concepts.mask_features, boxes_to_clip(regions, frame))[-1]  # [B, P*k, r, r]
        agreed = agreement(logits, regions, points, labels)  # [B, P, k]
        fit = fit * agreed * certainty(logits).view_as(fit) ** CERTAINTY
        agreed = agreed.gather(-1, fit.argmax(-1, keepdim=True))[..., 0]
        best = fit.argmax(-1)[..., None, None]  # [B, P, 1, 1]
        chosen, region = (tensor.unflatten(1, fit.shape[1:]) for tensor in (logits, regions))  # [B, P, k, ...]
        # gather, since take_along_dim would fix the number of prompts of an exported program
        region = region.gather(2, best.expand(-1, -1, 1, 4))[:, :, 0]
        chosen = chosen.gather(2, best[..., None].expand(-1, -1, 1, *logits.shape[-2:]))[:, :, 0]
        stride = self.config.mask_stride
        masks = paste(chosen, region / stride, (side // stride, side // stride))
        found = fit.amax(-1) > 0
        return torch.where(found[..., None, None], masks, 0.0), agreed * found

    def _locations(self, feature: Tensor, near: Tensor, stride: int) -> tuple[Tensor, ...]:
        """One level: [B, C, h, w] -> objectness, boxes, embeds, scale and shift, each [B, h*w, ...]."""
        feature = self.tower(feature)
        hidden = self.embedding[:-1](feature)
        h, w = feature.shape[-2:]
        # Boxes stay in float32: bfloat16 moves a small box by several per cent of its side.
        y, x = torch.meshgrid(
            torch.arange(h, device=feature.device), torch.arange(w, device=feature.device), indexing="ij"
        )
        center = (torch.stack([x, y], -1).view(1, h * w, 2).float() + 0.5) * stride
        sides = _rows(self.sides(feature)).float().clamp(max=5).exp() * (2 * stride)  # left, top, right, bottom
        boxes = torch.cat([center - sides[..., :2], center + sides[..., 2:]], -1)
        embeds = _rows(self.embedding[-1](hidden) + near)
        return _rows(self.objectness(feature)), boxes, embeds, _rows(self.scale_shift(hidden))


def _rows(feature: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h*w, C]"""
    return feature.flatten(2).transpose(1, 2)
