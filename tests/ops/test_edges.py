"""Edge maps of masks whose edges are known."""

import pytest
import torch
from torch.testing import assert_close

from ovsam.ops import edges
from ovsam.ops.edges import edge_map


def soft_disc(x, y, radius, size=64, sharpness=2.0):
    """Probabilities [h, w], a half on the circle."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    distance = ((columns - x) ** 2 + (rows - y) ** 2).sqrt()
    return ((radius - distance) * sharpness).sigmoid(), distance


def test_the_edge_of_a_disc_is_a_thin_circle():
    probability, distance = soft_disc(30.3, 33.8, 18)
    thin, thick = edge_map(probability[None]), edge_map(probability[None], thin=False)
    strong = thin > 0.4
    assert (distance[strong] - 18).abs().max() < 1.0
    assert strong.sum() < 2 * 3.1416 * 18 * 1.1 < (thick > 0.4).sum()  # a pixel wide
    angle = torch.atan2(*(strong.nonzero() - torch.tensor([33.8, 30.3])).T).sort().values
    assert angle.diff().max() < 0.12  # no gap: 1 px is 0.056 rad
    assert thick.max() == 1 and thick.min() == 0 and ((thin == thick) | (thin == 0)).all()


def test_sobel_and_the_largest_of_all_masks():
    step = torch.zeros(1, 16, 16)
    step[0, :, 8:] = 1
    both = torch.cat([step, 0.6 * step.transpose(1, 2)])
    expected = torch.zeros(16, 16)
    expected[7:9] = 0.6
    expected[:, 7:9] = 1
    found = edge_map(both, thin=False)
    assert_close(found[:5], expected[:5])
    assert_close(found[:, :5], expected[:, :5])
    assert ((edge_map(step) > 0).sum(1) == 1).all()  # of the two equal columns one stays


def test_only_the_outer_boundary_counts():
    probability, _ = soft_disc(32, 32, 20)
    textured = probability.clone()
    textured[28:36, 28:36] = 0.7  # unsure in the middle, yet all one mask
    assert edge_map(textured[None])[24:40, 24:40].max() == 0
    assert edge_map(torch.full((1, 9, 9), 0.2)).max() == 0


@pytest.mark.parametrize("count", [0, 5])
def test_chunks_and_empty_input(monkeypatch, count):
    masks = torch.stack([soft_disc(10 + 8 * i, 30, 9)[0] for i in range(count)]) if count else torch.zeros(0, 64, 64)
    whole = edge_map(masks)
    monkeypatch.setattr(edges, "CHUNK", 2 * 64 * 64)
    assert_close(edge_map(masks), whole, rtol=0, atol=0)
    assert (whole.max() > 0.5) == (count > 0)
