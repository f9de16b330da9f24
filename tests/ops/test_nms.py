"""Each suppression against the slow, obvious loop that its paper describes, on random boxes."""

import math

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import box_iou

from ovsam.ops.masks import mask_overlap
from ovsam.ops.nms import NMS, fast_box_nms, fast_nms, matrix_nms, suppress, within


def crowd(seed, count=40):
    """Boxes in clusters, their overlaps and scores, in no order."""
    torch.manual_seed(seed)
    corner = torch.rand(8, 2).repeat_interleave(count // 8, 0) * 60 + torch.rand(count, 2) * 8
    boxes = torch.cat([corner, corner + 15 + torch.rand(count, 2) * 10], 1)
    return boxes, box_iou(boxes, boxes), torch.rand(count)


def by_score(scores):
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def slow_fast(overlap, scores, threshold):
    order, kept = by_score(scores), list(scores)
    for place, j in enumerate(order):
        if any(overlap[i][j] > threshold for i in order[:place]):
            kept[j] = 0.0
    return kept


def slow_matrix(overlap, scores, threshold, sigma=0.5):
    order, new = by_score(scores), list(scores)
    for place, j in enumerate(order):
        decays = [1.0]
        for own, i in enumerate(order[:place]):
            doubt = max([overlap[k][i] for k in order[:own]], default=0.0)
            decays.append(math.exp(-(overlap[i][j] ** 2) / sigma) / math.exp(-(doubt**2) / sigma))
        new[j] *= min(decays)
    return new


SLOW = {"fast": slow_fast, "matrix": slow_matrix}


@pytest.mark.parametrize("threshold", [0.3, 0.6])
@pytest.mark.parametrize("name", NMS)
def test_equal_to_the_slow_loop_of_the_paper(name, threshold):
    changed = 0
    for seed in range(5):
        _, overlap, scores = crowd(seed)
        found = NMS[name](overlap, scores, threshold)
        expected = torch.tensor(SLOW[name](overlap.tolist(), scores.tolist(), threshold))
        assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (found <= scores).all() and found.argmax() == scores.argmax()
        changed += int((found < scores).sum())
    assert 20 < changed < 200  # something is suppressed, and not everything


@pytest.mark.parametrize("name", NMS)
def test_no_proposal_one_proposal_and_equal_proposals(name):
    assert NMS[name](torch.zeros(0, 0), torch.zeros(0), 0.5).shape == (0,)
    assert_close(NMS[name](torch.ones(1, 1), torch.tensor([0.4]), 0.5), torch.tensor([0.4]))
    twins = NMS[name](torch.ones(3, 3), torch.full((3,), 0.8), 0.5)  # of equals the first stays
    assert twins[0] == 0.8 and (twins[1:] < 0.2).all()
    apart = torch.eye(3)
    assert_close(NMS[name](apart, torch.tensor([0.2, 0.9, 0.5]), 0.5), torch.tensor([0.2, 0.9, 0.5]))


def test_scores_and_overlaps_are_left_as_they_were():
    _, overlap, scores = crowd(1)
    before = overlap.clone(), scores.clone()
    for function in NMS.values():
        function(overlap, scores, 0.5)
    assert torch.equal(overlap, before[0]) and torch.equal(scores, before[1])


def test_one_word_does_not_suppress_another():
    overlap, scores = torch.full((4, 4), 0.9), torch.tensor([0.9, 0.8, 0.7, 0.6])
    labels = torch.tensor([0, 1, 0, 1])
    assert (fast_nms(overlap, scores, 0.5) > 0).tolist() == [True, False, False, False]
    assert (fast_nms(within(overlap, labels), scores, 0.5) > 0).tolist() == [True, True, False, False]


def test_matrix_keeps_a_box_that_only_a_suppressed_one_overlaps():
    overlap = torch.tensor([[1, 0.9, 0.0], [0.9, 1, 0.6], [0.0, 0.6, 1]])
    new = matrix_nms(overlap, torch.tensor([0.9, 0.8, 0.7]))
    assert new[1] < 0.2 and new[2] == pytest.approx(0.7)


def test_masks_and_boxes_in_order():
    masks = torch.zeros(3, 10, 10, dtype=torch.bool)
    masks[0, :, :5], masks[1, :, :6], masks[2, 8:, 8:] = True, True, True
    assert_close(mask_overlap(masks)[0], torch.tensor([1, 50 / 60, 0]))
    assert suppress(mask_overlap(masks), 0.8).tolist() == [True, False, True]
    boxes, overlap, scores = crowd(2)
    order = scores.argsort(descending=True)
    expected = fast_nms(overlap, scores, 0.5)[order] > 0
    assert fast_box_nms(boxes[order], 0.5).tolist() == expected.tolist()
    assert fast_box_nms(boxes[:0], 0.5).shape == (0,)
