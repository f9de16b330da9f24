import numpy as np
import torch

from ovsam.ops.components import connected_cells, connected_nodes


def test_connected_cells():
    masks = torch.tensor([[[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0]]], dtype=torch.bool)
    places = connected_cells(masks)[0]
    assert torch.equal(places > 0, masks[0])
    first, diagonal, corner = places[0, 0], places[1, 3], places[3, 0]
    assert places[0, 1] == first and places[2, 2] == diagonal
    assert len({int(first), int(diagonal), int(corner)}) == 3


def test_connected_nodes():
    joined = np.zeros((6, 6), dtype=bool)
    for a, b in [(0, 4), (4, 2), (3, 5)]:  # 0-4-2, 3-5, 1 alone
        joined[a, b] = joined[b, a] = True
    assert connected_nodes(joined).tolist() == [0, 1, 0, 3, 0, 3]
    assert connected_nodes(np.zeros((0, 0), dtype=bool)).tolist() == []
