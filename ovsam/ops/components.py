"""Connected components: of a graph, and of the cells of masks."""

import numpy as np

from ovsam.ops.arrays import Array


def connected_nodes(joined: np.ndarray) -> np.ndarray:
    """joined [n, n] bool, symmetric -> [n], the number of the first node of each node's component."""
    names = np.arange(len(joined))
    while True:
        smallest = np.where(joined, names, len(names)).min(1, initial=len(names))
        smallest = np.minimum(names, smallest)
        if (smallest == names).all():
            return names
        names = smallest


def connected_cells(masks: Array) -> Array:
    """masks [K, h, w] bool, a tensor -> [K, h, w] int: 0 outside, and one number for all cells that touch, also at a
    corner.

    Every cell starts with a number of its own and takes the largest around it until nothing changes."""
    import torch
    import torch.nn.functional as F

    height, width = masks.shape[1:]
    own = torch.arange(1, height * width + 1, device=masks.device, dtype=torch.float32).view(height, width) * masks
    while True:
        spread = F.max_pool2d(own[:, None], 3, 1, 1)[:, 0] * masks
        if torch.equal(spread, own):
            return own.int()
        own = spread
