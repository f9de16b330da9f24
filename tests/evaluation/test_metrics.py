"""The metrics by hand: perfect predictions, and known errors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovsam.evaluation import metrics
from ovsam.ops import rle


def test_rank_counts_better_words():
    logits = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.3]])
    assert metrics.rank(logits, torch.tensor([2, 0])).tolist() == [1, 0]


def square(x: int, y: int, side: int, size: int = 100) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[y : y + side, x : x + side] = True
    return mask


def test_boundary_iou_by_hand():
    """In an image of 100 x 100 a boundary is round(0.02 * 141.4) = 3 pixels wide: of a square of side n it has
    n^2 - (n - 6)^2 pixels."""
    assert metrics.boundary_iou(square(20, 20, 30), square(20, 20, 30)) == 1
    assert metrics.boundary_iou(square(0, 0, 20), square(50, 50, 20)) == 0
    # One square inside the other by 2 pixels: they share the outermost ring of the inner one's boundary.
    ring = 26**2 - 24**2
    shared = metrics.boundary_iou(square(20, 20, 30), square(22, 22, 26))
    assert shared == pytest.approx(ring / ((30**2 - 24**2) + (26**2 - 20**2) - ring))
    # A hole of one pixel has a boundary of its own, 7 x 7 less the pixel.
    holed = square(20, 20, 30)
    holed[35, 35] = False
    assert metrics.boundary_iou(square(20, 20, 30), holed) == pytest.approx(324 / (324 + 48))


def test_the_border_of_the_image_counts_as_outside():
    """The boundary of a mask that fills the image is a frame."""
    assert metrics.erode(np.ones((20, 30), bool), 4).sum() == 12 * 22
    assert not metrics.erode(np.ones((7, 30), bool), 4).any()
    rng = np.random.default_rng(0)
    mask = rng.random((23, 31)) > 0.1
    padded = np.pad(mask, 2)  # word by word: all neighbours up to two pixels away
    every = [padded[y : y + 23, x : x + 31] for y in range(5) for x in range(5)]
    assert np.array_equal(metrics.erode(mask, 2), np.all(every, axis=0))


def test_calibration_error_by_hand():
    assert metrics.calibration_error([0.9, 0.9, 0.9, 0.9], [True, True, True, False]) == pytest.approx(0.15)
    # Two bins, of three and of one: 3/4 * |0.2 - 1/3| + 1/4 * |1 - 0|.
    error = metrics.calibration_error([0.2, 0.2, 0.2, 1.0], [True, False, False, False])
    assert error == pytest.approx(0.75 * (1 / 3 - 0.2) + 0.25)
    rng = np.random.default_rng(0)
    scores = rng.random(20_000)
    assert metrics.calibration_error(scores, rng.random(20_000) < scores) < 0.02
    assert metrics.calibration_error(scores, rng.random(20_000) < scores**3) > 0.2


def test_reliability_by_hand():
    mean, share, count = metrics.reliability([0.2, 0.2, 0.19, 1.0], [True, False, False, False])
    assert mean.tolist() == pytest.approx([0.59 / 3, 1.0]) and count.tolist() == [3, 1]
    assert share.tolist() == pytest.approx([1 / 3, 0])


def test_concept_f1_by_hand():
    """Three queries with objects: one of two found besides a false one, one found, one missed; and two without."""
    first = np.array([[0.72, 0.1], [0.3, 0.2]])
    queries = [first, np.array([[0.96]]), np.zeros((0, 1)), np.zeros((0, 0)), np.zeros((2, 0))]
    found = metrics.concept_f1(queries)
    # 0.50 to 0.70: two right, one false, two missed; 0.75 to 0.95: one right, two false, three missed.
    assert found["pmF1"] == pytest.approx((5 * 2 * 2 / (4 + 1 + 2) + 5 * 2 / (2 + 2 + 3)) / 10)
    assert found["IL_MCC"] == pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))
    assert found["cgF1"] == pytest.approx(found["pmF1"] * found["IL_MCC"])
    assert metrics.concept_f1([np.eye(3), np.zeros((0, 0))]) == {"cgF1": 1, "pmF1": 1, "IL_MCC": 1}


def test_concept_f1_matches_for_the_largest_sum():
    """The best pair alone would leave the other instance and object without a match."""
    assert metrics.concept_f1([np.array([[0.9, 0.8], [0.8, 0.1]]), np.zeros((0, 0))])["pmF1"] > 0.6


def test_an_object_counts_once_and_for_its_own_word():
    a, b = (rle.encode(square(x, 0, 10)) for x in (0, 50))
    shifted = rle.encode(square(2, 0, 10))  # IoU 2/3 with a
    words = ["cat", "cat", "dog", "cat"]
    assert metrics.are_right([shifted, a, a, b], words, [a, b], ["cat", "cat"]) == [True, False, False, True]
    assert metrics.are_right([a], ["cat"], [], []) == [False] and metrics.are_right([], [], [a], ["cat"]) == []


def test_the_next_click_corrects_the_larger_error():
    truth = square(10, 10, 41)
    assert metrics.next_click(square(10, 10, 41) & ~square(20, 20, 11), truth) == (25, 25, 1)
    assert metrics.next_click(truth | square(70, 70, 21), truth) == (80, 80, 0)
    assert metrics.next_click(truth, truth)[2] == -10


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_properties(seed):
    """Order does not matter, perfect answers get full marks, and duplicates never help."""
    rng = np.random.default_rng(seed)
    # Objects do not overlap: an instance can match one of them only.
    shapes = [(int(rng.integers(0, 4)), int(rng.integers(1, 3))) for _ in range(4)] + [(0, 0), (1, 0)]
    queries = [rng.random((n, 1)) * np.eye(m or 1)[rng.integers(0, m or 1, n)][:, :m] for n, m in shapes]
    figures = metrics.concept_f1(queries)
    mixed = [overlap[rng.permutation(len(overlap))] for overlap in queries]
    assert metrics.concept_f1([mixed[i] for i in rng.permutation(6)]) == pytest.approx(figures)
    doubled = metrics.concept_f1([np.concatenate([overlap, overlap]) for overlap in queries])
    assert doubled["pmF1"] <= figures["pmF1"] + 1e-12 and doubled["IL_MCC"] == pytest.approx(figures["IL_MCC"])

    one, two = (square(*rng.integers(0, 60, 2), int(rng.integers(5, 40))) for _ in range(2))
    assert metrics.boundary_iou(one, one) == 1
    assert metrics.boundary_iou(one, two) == metrics.boundary_iou(two, one) <= 1

    scores, right = rng.random(20), rng.random(20) < 0.5
    order = rng.permutation(20)
    assert metrics.calibration_error(scores[order], right[order]) == pytest.approx(
        metrics.calibration_error(scores, right)
    )
    assert metrics.calibration_error(right.astype(float), right) == 0
