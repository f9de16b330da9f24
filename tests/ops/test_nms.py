"""Each suppression against the slow, obvious loop that its paper describes, on random boxes."""

import math

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import box_iou, nms

from ovsam.ops.masks import mask_overlap
from ovsam.ops.nms import NMS, density_nms, fast_box_nms, fast_nms, greedy_nms, matrix_nms, soft_nms, suppress, within


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


def slow_greedy(overlap, scores, threshold):
    kept = []
    for j in by_score(scores):
        if all(overlap[i][j] <= threshold for i in kept):
            kept.append(j)
    return [score if i in kept else 0.0 for i, score in enumerate(scores)]


def slow_soft(overlap, scores, threshold, sigma=None):
    scores, left = list(scores), set(range(len(scores)))
    while left:
        best = max(left, key=lambda i: scores[i])
        left.remove(best)
        for i in left:
            if sigma is not None:
                scores[i] *= math.exp(-(overlap[best][i] ** 2) / sigma)
            elif overlap[best][i] > threshold:
                scores[i] *= 1 - overlap[best][i]
    return scores


def slow_matrix(overlap, scores, threshold, sigma=0.5):
    order, new = by_score(scores), list(scores)
    for place, j in enumerate(order):
        decays = [1.0]
        for own, i in enumerate(order[:place]):
            doubt = max([overlap[k][i] for k in order[:own]], default=0.0)
            decays.append(math.exp(-(overlap[i][j] ** 2) / sigma) / math.exp(-(doubt**2) / sigma))
        new[j] *= min(decays)
    return new


def slow_density(overlap, scores, threshold):
    scores, left = list(scores), set(range(len(scores)))
    while left:
        best = max(left, key=lambda i: scores[i])
        left.remove(best)
        if scores[best] == 0:
            break
        for i in left:
            if overlap[best][i] > threshold:
                signs = [
                    (overlap[j][i] - max(overlap[best][i], overlap[best][j])) / (1 - threshold)
                    for j in range(len(scores))
                    if j != i
                ]
                scores[i] *= min(1.0, max([0.0, *signs]))
    return scores


SLOW = {"fast": slow_fast, "greedy": slow_greedy, "soft": slow_soft, "matrix": slow_matrix, "density": slow_density}


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


def test_soft_nms_may_be_gaussian():
    _, overlap, scores = crowd(0)
    expected = torch.tensor(slow_soft(overlap.tolist(), scores.tolist(), 0.5, sigma=0.5))
    assert_close(soft_nms(overlap, scores, 0.5, sigma=0.5), expected, rtol=1e-4, atol=1e-5)


def test_greedy_is_torchvisions():
    boxes, overlap, scores = crowd(3)
    kept = greedy_nms(overlap, scores, 0.4).nonzero()[:, 0]
    assert kept.tolist() == sorted(nms(boxes, scores, 0.4).tolist())


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


def test_density_keeps_the_second_of_two_that_stand_close():
    """A and B are two people, the others further proposals of each; all of B's overlap A by more than the threshold."""
    overlap = torch.tensor(  # A, B, A2, B2
        [[1, 0.65, 0.9, 0.62], [0.65, 1, 0.62, 0.85], [0.9, 0.62, 1, 0.61], [0.62, 0.85, 0.61, 1]]
    )
    scores = torch.tensor([0.9, 0.85, 0.8, 0.7])
    assert (greedy_nms(overlap, scores, 0.6) > 0).tolist() == [True, False, False, False]
    # B2 overlaps B by 0.2 more than either overlaps A, half of what there is above the threshold.
    assert_close(density_nms(overlap, scores, 0.6), torch.tensor([0.9, 0.85 * 0.5, 0.0, 0.0]))
    alone = overlap[:3, :3]
    assert (density_nms(alone, scores[:3], 0.6) > 0).tolist() == [True, False, False]


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
