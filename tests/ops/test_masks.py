"""Overlaps of masks by hand."""

import pytest
import torch

from ovsam.ops.masks import mask_overlap


def test_overlap_by_hand():
    a, b = torch.zeros(2, 4, 4, dtype=torch.bool), torch.zeros(1, 4, 4, dtype=torch.bool)
    a[0, :2], a[1, :, :1], b[0, :1] = True, True, True
    assert mask_overlap(a, b).tolist() == [[pytest.approx(4 / 8)], [pytest.approx(1 / 7)]]
    assert torch.equal(mask_overlap(a), mask_overlap(a, a))
