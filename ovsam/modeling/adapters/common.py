"""Base class and modules of the adapters."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align
from transformers import PreTrainedModel
from transformers import initialization as init


class AdapterModel(PreTrainedModel):
    """Base of the adapters: each is a model of its own, so each can be saved, published, loaded and swapped alone."""

    main_input_name = "maps"
    supports_gradient_checkpointing = False
    reads_tokens = False  # an adapter that classifies masks by the tokens of the mask decoder as well sets True
    _supports_sdpa = True  # attention, where there is any, is that of torch or of a module of its own

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        else:  # attention
            super()._init_weights(module)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Remote code is one shim file beside the weights (see hub/); transformers must not copy our sources."""


def maps_at_strides(maps: tuple[Tensor, ...], size: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four maps of an image tower as input of the adapters: at strides 4, 8, 16 and 32 of an image of `size` (height,
    width) pixels.

    Maps of a pyramid (ConvNeXt, ResNet) are returned unchanged. The four maps of a plain transformer, all at one
    stride, are resampled: ViTDet's simple feature pyramid (Li et al. 2022) without its convolutions, which those of the
    adapters replace.
    """
    grids = [tuple(side // stride for side in size) for stride in (4, 8, 16, 32)]
    return tuple(
        # In float32: on CPU there is no other kernel.
        m if m.shape[-2:] == grid else F.interpolate(m.float(), size=grid, mode="bilinear", antialias=True).to(m.dtype)
        for m, grid in zip(maps, grids, strict=True)
    )


def upsample(feature: Tensor) -> Tensor:
    return F.interpolate(feature, scale_factor=2.0, mode="nearest")


class TopDown(nn.Module):
    """The light feature pyramid of Open-Vocabulary SAM (§3.2): 1x1 laterals, nearest top-down additions.

    Maps at strides 8, 16, 32 -> three maps of `width` channels at the same strides.
    """

    def __init__(self, channels: tuple[int, ...], width: int):
        super().__init__()
        self.laterals = nn.ModuleList([nn.Conv2d(c, width, 1) for c in channels])

    def forward(self, maps: tuple[Tensor, ...]) -> list[Tensor]:
        laterals = [lateral(feature) for lateral, feature in zip(self.laterals, maps, strict=True)]
        for i in range(len(laterals) - 2, -1, -1):
            laterals[i] = laterals[i] + upsample(laterals[i + 1])
        return laterals


def box_rois(boxes: Tensor) -> Tensor:
    """Boxes [B, P, 4] -> RoIAlign's rows [B*P, 5], the image's number before each box."""
    image = torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])
    return torch.cat([image[:, None], boxes.flatten(0, 1)], 1).float()


def box_levels(boxes: Tensor, finest_size: float, levels: int) -> Tensor:
    """Boxes [..., 4] -> the pyramid level of each [...], the finest for boxes less than twice `finest_size` pixels
    across, the next for less than four times, and so on (FPN, Lin et al. 2017, eq. 1)."""
    side = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1).sqrt()
    return torch.floor(torch.log2(side / finest_size + 1e-6)).clamp(0, levels - 1).long()


def pool_from_pyramid(
    levels: Sequence[Tensor], stride: int, boxes: Tensor, size: int, finest_size: float, sampling_ratio: int = -1
) -> Tensor:
    """RoIAlign of each box from the level that suits its size.

    Args:
        levels: maps [B, C, hi, wi], the first at `stride`, each of the others at twice the stride before.
        boxes: [B, P, 4] xyxy in pixels of the model input.
        size: cells r across a pooled region.
        finest_size: see `box_levels`.

    Returns:
        [B*P, C, r, r]
    """
    rois, level = box_rois(boxes), box_levels(boxes, finest_size, len(levels)).flatten()
    pooled = rois.new_zeros(rois.shape[0], levels[0].shape[1], size, size)
    for i, feature in enumerate(levels):
        if torch.compiler.is_compiling():  # every box from every level: shapes must not depend on the boxes
            found = roi_align(feature.float(), rois, size, 1 / (stride * 2**i), sampling_ratio, aligned=True)
            pooled = torch.where((level == i)[:, None, None, None], found, pooled)
            continue
        here = (level == i).nonzero()[:, 0]
        found = roi_align(feature.float(), rois[here], size, 1 / (stride * 2**i), sampling_ratio, aligned=True)
        pooled = pooled.index_copy(0, here, found)
    return pooled.to(levels[0].dtype)


class RegionProjection(nn.Module):
    """Class embedding of each location by the CLIP tower itself: a linear map of strides 16 and 32, at stride 16.

    An adapter starts from this (with the weights of the tower's own projection) and learns a correction.
    """

    def __init__(self, channels: tuple[int, ...], embed_dim: int):
        super().__init__()
        self.detail = nn.Conv2d(channels[-2], embed_dim, 1)
        self.context = nn.Conv2d(channels[-1], embed_dim, 1)

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        return self.detail(maps[-2]) + upsample(self.context(maps[-1]))  # [B, D, H/16, W/16]


class ResidualMlp(nn.Module):
    """[..., width] -> [..., width]: the input plus an MLP of its normalised values."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))
