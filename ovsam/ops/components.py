"""Connected components: of a graph, and of the cells of masks."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def connected_nodes(joined: np.ndarray) -> np.ndarray:
    """joined [n, n] bool, symmetric -> [n], the number of the first node of each node's component."""
    names = np.arange(len(joined))
    while True:
        smallest = np.where(joined, names, len(names)).min(1, initial=len(names))
        smallest = np.minimum(names, smallest)
        if (smallest == names).all():
            return names
        names = smallest


def connected_cells(masks: Tensor) -> Tensor:
    """masks [K, h, w] bool -> [K, h, w] int: 0 outside, and one number for all cells that touch, also at a corner.

    Every cell starts with a number of its own and takes the largest around it until nothing changes."""
    height, width = masks.shape[1:]
    own = torch.arange(1, height * width + 1, device=masks.device, dtype=torch.float32).view(height, width) * masks
    while True:
        spread = F.max_pool2d(own[:, None], 3, 1, 1)[:, 0] * masks
        if torch.equal(spread, own):
            return own.int()
        own = spread
