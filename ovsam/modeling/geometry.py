"""Coordinates of CLIP's input and of the model input: both show the same image, resized or padded differently.

A frame [B, 4] holds sx, sy, dx, dy of each image: x in pixels of CLIP's input = sx * x in pixels of the model input +
dx, and y likewise. If both sides share their input the frame is None, and nothing is computed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_frame(window: Tensor, size: float, clip_size: tuple[int, int]) -> Tensor:
    """window [B, 4]: the rectangle covered by CLIP's input, x1, y1, x2, y2 in fractions of the model input, which is
    `size` pixels wide and high; clip_size: height and width of CLIP's input in pixels -> frame [B, 4]."""
    height, width = clip_size
    x1, y1, x2, y2 = window.float().unbind(-1)
    sx, sy = width / (x2 - x1), height / (y2 - y1)
    return torch.stack([sx / size, sy / size, -x1 * sx, -y1 * sy], -1)


def boxes_to_clip(boxes: Tensor, frame: Tensor | None) -> Tensor:
    """boxes [B, I, 4] xyxy in pixels of the model input -> in pixels of CLIP's input."""
    return boxes if frame is None else boxes * _scale(frame) + _shift(frame)


def boxes_from_clip(boxes: Tensor, frame: Tensor | None) -> Tensor:
    """boxes [B, I, 4] xyxy in pixels of CLIP's input -> in pixels of the model input."""
    return boxes if frame is None else (boxes - _shift(frame)) / _scale(frame)


def maps_to_clip(maps: Tensor, frame: Tensor | None, size: float, clip_size: tuple[int, int]) -> Tensor:
    """maps [B, I, h, w] over the model input (`size` pixels) -> over CLIP's input, zero outside the former."""
    if frame is None:
        return maps
    height, width = clip_size
    # grid_sample takes, for each cell of the result, its position in the source; both in [-1, 1].
    kx, ky = width / (frame[:, 0] * size), height / (frame[:, 1] * size)
    tx, ty = -frame[:, 2] / (frame[:, 0] * size), -frame[:, 3] / (frame[:, 1] * size)
    return _warp(maps, kx, ky, tx, ty)


def _warp(maps: Tensor, kx: Tensor, ky: Tensor, tx: Tensor, ty: Tensor) -> Tensor:
    """Resample a map: position u of the result, as a fraction, is position k * u + t of the source. Each k, t: [B]."""
    zero = torch.zeros_like(kx)
    # u in [0, 1] is (1 + g) / 2 for g in [-1, 1]: source = k * g + (k - 1 + 2 * t)
    theta = torch.stack(
        [torch.stack([kx, zero, kx - 1 + 2 * tx], -1), torch.stack([zero, ky, ky - 1 + 2 * ty], -1)], 1
    )  # [B, 2, 3]
    grid = F.affine_grid(theta, list(maps.shape), align_corners=False)
    return F.grid_sample(maps.float(), grid, align_corners=False).to(maps.dtype)


def _scale(frame: Tensor) -> Tensor:
    return frame[:, None, [0, 1, 0, 1]]


def _shift(frame: Tensor) -> Tensor:
    return frame[:, None, [2, 3, 2, 3]]


def square_window(height: int, width: int) -> tuple[float, float, float, float]:
    """The rectangle covered by OWLv2's input, x1, y1, x2, y2 in fractions of an image of height x width pixels.

    Owlv2ImageProcessor (transformers 5.23, with `do_pad`) pads to the longer side in whole pixels and then resizes the
    square, so nothing is rounded and this is exact.
    """
    side = max(height, width)
    return 0.0, 0.0, side / width, side / height
