"""Edge maps out of masks (SAM, Kirillov et al. 2023, §7.2 and App. D.2): no edge was ever trained."""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2**24  # pixels of all masks that are filtered at a time


def edge_map(probabilities: Tensor, thin: bool = True) -> Tensor:
    """The edges of a picture out of the masks of everything in it.

    Each mask's probabilities are filtered by Sobel's operator; what is not on the mask's outer boundary is zero; the
    largest of all masks counts; the map is scaled to [0, 1]; and edges are thinned to their crest (non-maximum
    suppression along the gradient, Canny 1986).

    Args:
        probabilities: [n, h, w] of masks as the model gave them, not thresholded: `outputs.pred_masks.sigmoid()`.
        thin: False leaves the edges as broad as they are.

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
    """Pixels [n, h, w] bool on either side of a mask's border, with one more for the filter's width."""
    grown = F.max_pool2d(masks[:, None].float(), 5, 1, 2)
    shrunk = -F.max_pool2d(-masks[:, None].float(), 5, 1, 2)
    return (grown > shrunk)[:, 0]


def _thin(edges: Tensor, direction: Tensor) -> Tensor:
    """Keep what is no weaker than both neighbours one pixel up and down the gradient [2, h, w], interpolated."""
    h, w = edges.shape
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    place = torch.stack([x, y], -1).to(edges)  # [h, w, 2]
    unit = (direction / direction.norm(dim=0).clamp(min=1e-12)).permute(1, 2, 0)  # [2, h, w] -> [h, w, 2]
    size = edges.new_tensor([w, h])
    grids = torch.stack([(2 * (place + sign * unit) + 1) / size - 1 for sign in (1, -1)])  # pixel centres in [-1, 1]
    beside = F.grid_sample(edges.expand(2, 1, h, w), grids, align_corners=False)[:, 0]  # [2, h, w]
    # On a plateau of two equal pixels the one that the gradient comes from stays.
    return edges * ((edges > beside[0] + 1e-6) & (edges >= beside[1] - 1e-6))
