"""ConceptHead: objectness, box, class embedding and mask coefficients of every location of an image, without queries.

It combines DenseCLIP (dense CLIP scores) and YOLACT (prototype masks). Text queries come later, as one matrix product,
so any number of them costs about the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ovsam.modeling.adapters.common import AdapterModel, RegionProjection, TopDown, upsample
from ovsam.modeling.outputs import ConceptOutput
from ovsam.modeling.remote_code import RemoteCodeConfig


class ConceptHeadConfig(RemoteCodeConfig):
    """`in_channels` are the channels of the maps at strides 4, 8, 16 and 32. Locations are at strides 16 and 32."""

    model_type = "ovsam_concepts"
    auto_classes = {"AutoModel": "ConceptHead"}

    in_channels: list | tuple = (32, 64, 96, 960)
    embed_dim: int = 384
    width: int = 128
    num_prototypes: int = 32
    prototype_width: int = 48


class ConceptHead(AdapterModel):
    config: ConceptHeadConfig
    base_model_prefix = "concepts"
    strides = (16, 32)

    def __init__(self, config: ConceptHeadConfig):
        super().__init__(config)
        width, channels = config.width, tuple(config.in_channels)
        self.region = RegionProjection(channels, config.embed_dim)
        self.pyramid = TopDown(channels[1:], width)
        self.tower = nn.Sequential(*self._block(width, width), *self._block(width, width))
        self.objectness = nn.Conv2d(width, 1, 1)
        self.sides = nn.Conv2d(width, 4, 1)
        self.coefficients = nn.Conv2d(width, config.num_prototypes, 1)
        self.embedding = nn.Sequential(*self._block(width, 2 * width), nn.Conv2d(2 * width, config.embed_dim, 1))
        self.scale_shift = nn.Conv2d(2 * width, 2, 1)
        fine = config.prototype_width
        self.detail = nn.Conv2d(channels[0], fine, 1)
        self.prototype_in = nn.Conv2d(width, fine, 3, padding=1)
        self.prototype_out = nn.Sequential(nn.Conv2d(fine, fine, 3, padding=1), nn.ReLU())
        self.prototypes = nn.Conv2d(fine, config.num_prototypes, 1)
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
        stride8, stride16, stride32 = self.pyramid(maps[1:])
        region = self.region(maps)  # [B, D, H/16, W/16]
        regions = (region, F.avg_pool2d(region, 2))

        per_level = [
            self._locations(feature, near, stride)
            for feature, near, stride in zip((stride16, stride32), regions, self.strides, strict=True)
        ]
        objectness, boxes, embeds, scale_shift, coefficients = (
            torch.cat(part, dim=1) for part in zip(*per_level, strict=True)
        )
        scale, shift = scale_shift.float().unbind(-1)

        prototypes = F.relu(upsample(self.prototype_in(stride8)) + self.detail(maps[0]))  # [B, 48, H/4, W/4]
        prototypes = self.prototypes(self.prototype_out(prototypes))
        return ConceptOutput(
            objectness=objectness[..., 0],
            boxes=boxes,
            embeds=F.normalize(embeds, dim=-1),
            logit_scale=F.elu(scale[..., None]) + 1,
            logit_shift=shift[..., None],
            coefficients=coefficients,
            prototypes=prototypes,
        )

    def _locations(self, feature: Tensor, near: Tensor, stride: int) -> tuple[Tensor, ...]:
        """One level: [B, C, h, w] -> objectness, boxes, embeds, scale and shift, coefficients, each [B, h*w, ...]."""
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
        return (
            _rows(self.objectness(feature)),
            boxes,
            embeds,
            _rows(self.scale_shift(hidden)),
            _rows(self.coefficients(feature)),
        )


def _rows(feature: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h*w, C]"""
    return feature.flatten(2).transpose(1, 2)
