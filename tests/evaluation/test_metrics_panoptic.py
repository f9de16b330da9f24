"""Panoptic quality and mean IoU: a hand-made case with the values of panopticapi, and rules that hold for any maps."""

import numpy as np
import pytest

from ovsam.evaluation.metrics_panoptic import Panoptic, mean_iou, panoptic_quality


def hand_made() -> list[tuple[Panoptic, Panoptic]]:
    """Two images with matches, a wrong class, void, a crowd, a missed segment and one in void alone."""
    truth, guess = np.zeros((20, 20), int), np.zeros((20, 20), int)
    truth[:8, :10], truth[:8, 10:], truth[8:14, :6], truth[8:14, 6:] = 1, 2, 3, 4
    guess[:8, :9], guess[:7, 9:], guess[8:14, :6], guess[8:14, 10:18], guess[15:20, 2:8] = 5, 6, 7, 8, 9
    first = Panoptic(guess, {5: 1, 6: 2, 7: 2, 8: 3, 9: 1}), Panoptic(truth, {1: 1, 2: 2, 3: 1, 4: 3}, frozenset({4}))
    truth, guess = np.zeros((20, 20), int), np.zeros((20, 20), int)
    truth[2:12, 2:12], truth[14:18, 3:15] = 1, 2
    guess[0:12, 2:12], guess[14:18, 9:19], guess[18:20, :] = 1, 2, 3
    second = Panoptic(guess, {1: 1, 2: 2, 3: 3}), Panoptic(truth, {1: 1, 2: 2})
    return [first, second]


def test_the_hand_made_case_has_the_values_of_panopticapi():
    """Computed once by pq_compute_single_core and pq_average of cocodataset/panopticapi (7bb4655)."""
    expected = {"PQ": 0.5409195402298851, "SQ": 0.8772988505747126, "RQ": 0.6}
    assert panoptic_quality(hand_made()) == pytest.approx(expected, abs=1e-12)


def test_quality_by_hand():
    """One class: a match of IoU 0.6, one missed and one false, so PQ = 0.6 / (1 + 1/2 + 1/2)."""
    truth, guess = np.zeros((1, 40), int), np.zeros((1, 40), int)
    truth[0, :10], truth[0, 10:20], truth[0, 20:25] = 1, 3, 2
    guess[0, :6], guess[0, 12:18] = 1, 2
    one = Panoptic(guess, {1: 1, 2: 1}), Panoptic(truth, {1: 1, 2: 1, 3: 5})
    found = panoptic_quality([one])
    assert found == pytest.approx({"PQ": (0.6 / 2 + 0) / 2, "SQ": 0.6 / 2, "RQ": (1 / 2 + 0) / 2})  # class 5 is missed
    with pytest.raises(ValueError, match="Segment 3"):
        panoptic_quality([(one[0], Panoptic(truth, {1: 1, 2: 1}))])


def random_map(rng: np.random.Generator) -> Panoptic:
    ids = np.kron(rng.integers(0, 6, (4, 4)), np.ones((5, 5), int))
    return Panoptic(ids, {i: int(rng.integers(1, 3)) for i in range(1, 6)})


@pytest.mark.parametrize("seed", range(5))
def test_properties(seed):
    rng = np.random.default_rng(seed)
    truth = [random_map(rng) for _ in range(3)]
    guess = [random_map(rng) for _ in range(3)]
    assert panoptic_quality(zip(truth, truth, strict=True)) == {"PQ": 1, "SQ": 1, "RQ": 1}
    pairs = list(zip(guess, truth, strict=True))
    score = panoptic_quality(pairs)
    assert panoptic_quality(pairs[::-1]) == pytest.approx(score) and score["PQ"] < 1
    moved = [Panoptic(np.where(g.ids > 0, g.ids + 7, 0), {k + 7: v for k, v in g.class_of.items()}) for g in guess]
    assert panoptic_quality(zip(moved, truth, strict=True)) == pytest.approx(score)


def test_mean_iou_by_hand():
    truth = np.array([[0, 0, 1, 1], [0, 255, 1, 2]])
    guess = np.array([[0, 1, 1, 1], [0, 0, 2, 255]])
    # Class 0: 2 of 3; class 1: 2 of 4; class 2: none of 2.
    assert mean_iou([(guess, truth)], 4) == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)
    assert mean_iou([(truth, truth)], 3) == 1
