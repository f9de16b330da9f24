"""MaskHead: the mask of any box, predicted inside the box (Mask R-CNN, He et al. 2017)."""

from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from ovsam.modeling.adapters.common import box_rois, upsample

MARGIN = 1.15  # masks extend a little beyond their box, which may be predicted and too small
SMALLEST = 8.0  # side in pixels of the smallest region
AT_ONCE = 8  # regions at once on a CPU, whose features stay in the cache (measured)


def mask_regions(boxes: Tensor) -> Tensor:
    """Boxes [..., 4] xyxy in pixels -> the regions [..., 4] in which their masks are predicted."""
    center = (boxes[..., :2] + boxes[..., 2:]) / 2
    half = ((boxes[..., 2:] - boxes[..., :2]) * (MARGIN / 2)).clamp(min=SMALLEST / 2)
    return torch.cat([center - half, center + half], -1)


class MaskHead(nn.Module):
    """A pyramid over the maps of the image, RoIAlign of every region, and a small U-Net inside it.

    The coarse half of the region's grid has the context of the pyramid at stride 16, the fine half the details of
    stride 4. Large and small objects have masks of the same number of cells.

    Args:
        channels: channels of the maps at strides 4, 8, 16 and 32.
        width: width of the coarse half; the pyramid at strides 4 and 8 has two thirds of it.
        cells: cells across a region at the coarsest level of the U-Net; masks have four times as many.
    """

    def __init__(self, channels: tuple[int, ...], width: int = 96, cells: int = 14):
        super().__init__()
        self.cells, fine = cells, 2 * width // 3
        self.laterals = nn.ModuleList(
            [nn.Conv2d(c, w, 1) for c, w in zip(channels, (fine, fine, width, width), strict=True)]
        )
        self.smooth = nn.ModuleList([_block(fine, fine), _block(fine, fine), _block(width, fine), _block(width, width)])
        self.enter = nn.Conv2d(fine + width + 4, width, 1)  # + 4: position in the region and size of the region
        self.convs = nn.Sequential(*(_block(width, width) for _ in range(3)))
        self.middle = Finer(width, width // 2, fine)
        self.middle_mask = nn.Conv2d(width // 2, 1, 1)
        self.last = Finer(width // 2, width // 4, fine)
        self.last_mask = nn.Conv2d(width // 4, 1, 1)

    def features(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """maps: [B, Ci, hi, wi] at strides 4, 8, 16, 32 -> the maps that regions read, [B, 2/3 width, H/4, W/4]
        and [B, width, H/16, W/16]."""
        stride4, stride8, stride16, stride32 = (
            lateral(feature) for lateral, feature in zip(self.laterals, maps, strict=True)
        )
        stride16 = stride16 + upsample(self.smooth[3](stride32))
        stride8 = self.smooth[1](stride8 + upsample(self.smooth[2](stride16)))
        return self.smooth[0](stride4 + upsample(stride8)), stride16

    def forward(self, features: tuple[Tensor, Tensor], regions: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            features: see `features`.
            regions: [B, P, 4] xyxy in pixels of the input of the maps.

        Returns:
            mask logits inside the regions at both resolutions, the finer one last: [B, P, 2r, 2r] and [B, P, 4r, 4r]
            with r = `cells`.
        """
        if regions.device.type != "cpu" or torch.compiler.is_compiling():
            return self._some_masks(features, regions)
        maps = features[0].contiguous(), features[1].contiguous()  # RoIAlign would copy another layout for every part
        parts = [self._some_masks(maps, some) for some in regions.split(AT_ONCE, 1)]
        first, second = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return first, second

    def _some_masks(self, features: tuple[Tensor, Tensor], regions: Tensor) -> tuple[Tensor, Tensor]:
        fine, coarse = features
        rois, cells = box_rois(regions), self.cells
        finest = roi_align(fine.float(), rois, 4 * cells, 1 / 4, 1, aligned=True).to(fine.dtype)  # [B*P, fine, 4r, 4r]
        middle = F.avg_pool2d(finest, 2)
        context = roi_align(coarse.float(), rois, cells, 1 / 16, 1, aligned=True).to(fine.dtype)
        place = _place(rois, cells, 4 * fine.shape[-1]).to(fine.dtype)
        hidden = self.convs(self.enter(torch.cat([F.avg_pool2d(middle, 2), context, place], 1)))  # [B*P, width, r, r]
        hidden = self.middle(hidden, middle)  # [B*P, width/2, 2r, 2r]
        first = self.middle_mask(hidden)
        hidden = self.last(hidden, finest)  # [B*P, width/4, 4r, 4r]
        second = self.last_mask(hidden) + _double(first)
        return tuple(mask[:, 0].unflatten(0, regions.shape[:2]) for mask in (first, second))  # type: ignore[return-value]


class Finer(nn.Module):
    """One step of the U-Net: twice the cells, with the details of the pyramid added."""

    def __init__(self, width: int, out: int, fine: int):
        super().__init__()
        self.up, self.skip, self.block = nn.Conv2d(width, out, 1), nn.Conv2d(fine, out, 1), _block(out, out)

    def forward(self, hidden: Tensor, details: Tensor) -> Tensor:
        """hidden [n, width, r, r], details [n, fine, 2r, 2r] -> [n, out, 2r, 2r]"""
        return self.block(_double(self.up(hidden)) + self.skip(details))


def _block(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(gcd(8, out), out), nn.ReLU())


def _double(feature: Tensor) -> Tensor:
    return F.interpolate(feature, scale_factor=2.0, mode="bilinear")


def _place(rois: Tensor, cells: int, side: int) -> Tensor:
    """RoIAlign's rows [n, 5] -> [n, 4, cells, cells]: x and y from -1 to 1 across the region, and the logarithm of its
    width and height as fractions of the image's `side`."""
    line = torch.linspace(-1, 1, cells, device=rois.device)
    y, x = torch.meshgrid(line, line, indexing="ij")
    size = ((rois[:, 3:] - rois[:, 1:3]).clamp(min=1) / side).log()  # [n, 2]
    grid = torch.stack([x, y]).expand(rois.shape[0], -1, -1, -1)  # not len(), which would fix it in an exported program
    return torch.cat([grid, size[:, :, None, None].expand(-1, -1, cells, cells)], 1)
