"""Overlaps of masks by hand."""

import pytest
import torch

from ovsam.ops.masks import follow_clicks, mask_overlap


def test_overlap_by_hand():
    a, b = torch.zeros(2, 4, 4, dtype=torch.bool), torch.zeros(1, 4, 4, dtype=torch.bool)
    a[0, :2], a[1, :, :1], b[0, :1] = True, True, True
    assert mask_overlap(a, b).tolist() == [[pytest.approx(4 / 8)], [pytest.approx(1 / 7)]]
    assert torch.equal(mask_overlap(a), mask_overlap(a, a))


def test_masks_follow_their_clicks():
    masks = torch.randn(2, 3, 40, 48, generator=torch.Generator().manual_seed(0)) * 10 - 8
    # The clicks are far from each other, so that none undoes another one; the last one is padding.
    points = torch.tensor([[5.0, 5.0], [40.0, 35.0], [5.0, 35.0], [0.0, 0.0]]).expand(2, 3, -1, -1)
    labels = torch.tensor([1, 0, 1, -10]).expand(2, 3, -1)
    changed = follow_clicks(masks, points, labels)
    at = points.long()
    clicked = changed.flatten(2).gather(-1, at[..., 1] * 48 + at[..., 0])
    assert (clicked[..., [0, 2]] > 0).all() and (clicked[..., 1] < 0).all()


def test_a_change_by_a_click_is_local_and_masks_that_agree_are_unchanged():
    mask = torch.full((1, 1, 64, 64), -6.0)
    mask[..., 10:30, 10:30] = 30.0
    agreeing = torch.tensor([[[[20.0, 20.0], [50.0, 50.0]]]])
    labels = torch.tensor([[[1, 0]]])
    assert torch.equal(follow_clicks(mask, agreeing, labels), mask)
    ignored = torch.tensor([[[2, 3]]])
    assert torch.equal(follow_clicks(mask, agreeing, ignored), mask)
    contradicting = torch.tensor([[[[12.0, 12.0], [50.0, 50.0]]]])
    changed = follow_clicks(mask, contradicting, torch.tensor([[[0, 0]]]))[0, 0]
    assert changed[12, 12] < 0 and changed[28, 28] > 0 and (changed[40:] < 0).all()
    assert follow_clicks(mask[:, :0], agreeing[:, :0], labels[:, :0]).shape == (1, 0, 64, 64)
