"""Edge maps from masks (SAM, Kirillov et al. 2023, §7.2 and App. D.2), without training on edges."""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2**24  # number of pixels, over all masks, that are filtered at a time


def edge_map(probabilities: Tensor, thin: bool = True) -> Tensor:
    """Return the edges of an image, from the masks of all its objects.

    The probabilities of each mask are filtered with Sobel's operator and set to zero away from the boundary of the
    mask; the maximum over all masks is scaled to [0, 1], and edges are thinned by non-maximum suppression along the
    gradient (Canny 1986).

    Args:
        probabilities: mask probabilities [n, h, w], not thresholded: `outputs.pred_masks.sigmoid()`.
        thin: whether to thin the edges.

    Returns:
        [h, w] in [0, 1].
    """
    count, h, w = probabilities.shape
    edges = probabilities.new_zeros(h, w)
    direction = probabilities.new_zeros(2, h, w)
    step = max(1, CHUNK // (h * w))
    for start in range(0, count, step):
        part = probabilities[start : start + step]
        gradient = _sobel(part)  # [m, 2, h, w]
        strength, mask = (gradient.norm(dim=1) * _boundary(part > 0.5)).max(0)
        better = strength > edges
        winner = gradient.gather(0, mask.expand(1, 2, h, w))[0]  # [2, h, w]
        edges = torch.where(better, strength, edges)
        direction = torch.where(better, winner, direction)
    edges = edges / edges.amax().clamp(min=1e-12)
    return _thin(edges, direction) if thin else edges


def _sobel(images: Tensor) -> Tensor:
    """[n, h, w] -> the gradient [n, 2, h, w], x and y."""
    kernel = images.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    padded = F.pad(images[:, None], (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, torch.stack([kernel, kernel.T])[:, None])


def _boundary(masks: Tensor) -> Tensor:
    """Pixels [n, h, w] bool on either side of a mask's border, plus one for the width of the filter."""
    grown = F.max_pool2d(masks[:, None].float(), 5, 1, 2)
    shrunk = -F.max_pool2d(-masks[:, None].float(), 5, 1, 2)
    return (grown > shrunk)[:, 0]


def _thin(edges: Tensor, direction: Tensor) -> Tensor:
    """Keep pixels that are not below their interpolated neighbours, one pixel up and down the gradient [2, h, w]."""
    h, w = edges.shape
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    place = torch.stack([x, y], -1).to(edges)  # [h, w, 2]
    unit = (direction / direction.norm(dim=0).clamp(min=1e-12)).permute(1, 2, 0)  # [2, h, w] -> [h, w, 2]
    size = edges.new_tensor([w, h])
    grids = torch.stack([(2 * (place + sign * unit) + 1) / size - 1 for sign in (1, -1)])  # pixel centres in [-1, 1]
    beside = F.grid_sample(edges.expand(2, 1, h, w), grids, align_corners=False)[:, 0]  # [2, h, w]
    # Of two equal pixels the first along the gradient is kept.
    return edges * ((edges > beside[0] + 1e-6) & (edges >= beside[1] - 1e-6))
