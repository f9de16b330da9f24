"""Figures of records: perfect predictions, and known errors."""

from pathlib import Path

import numpy as np
import pytest

from ovsam.evaluation.datasets import EvalSet
from ovsam.evaluation.summary import summarise


def detection(image, word, score, code):
    return {"image_id": image, "category_id": word, "score": score, "segmentation": code}


def of_words(coco, found, threshold=0.5, absent=(2, 3)):
    """The figures of detections; image 1 is queried for the absent words."""
    records = [
        {
            "image_id": image,
            "words": {
                "seconds": 0.1,
                "present": [1] if image == 1 else [1, 2],
                "absent": list(absent) if image == 1 else [3],
                "found": [one for one in found if one["image_id"] == image],
            },
        }
        for image in (1, 2)
    ]
    return summarise(records, EvalSet(coco, Path()), threshold)


def test_perfect_answers(coco):
    dataset, masks = coco
    found = [detection(1, 1, 1.0, masks[0]), detection(2, 1, 1.0, masks[1]), detection(2, 2, 1.0, masks[2])]
    figures = of_words(dataset, found)
    for name in ("AP50", "AP", "AP50, base", "AP, novel", "boundary AP", "AP-pool", "cgF1", "pmF1", "IL_MCC"):
        assert figures[f"words -> masks: {name}"] == pytest.approx(1), name
    assert figures["words -> masks: calibration error"] == figures["absent words that return anything"] == 0
    assert figures["seconds: words"] == 0.1


def test_an_absent_word_that_returns_something_costs_ap_and_is_counted(coco):
    """Word 2 is not in image 1: an instance there with a higher score than the one in image 2 halves precision."""
    dataset, masks = coco
    right = [detection(1, 1, 0.9, masks[0]), detection(2, 1, 0.8, masks[1]), detection(2, 2, 0.7, masks[2])]
    figures = of_words(dataset, [*right, detection(1, 2, 0.95, masks[0])])
    assert figures["words -> masks: AP50, novel"] == pytest.approx(0.5)
    assert figures["words -> masks: AP50, base"] == pytest.approx(1)
    assert figures["absent words that return anything"] == pytest.approx(1 / 3)
    assert figures["words -> masks: pmF1"] == 1  # instances of an absent word count in IL_MCC only
    yes, no, extra = 3, 2, 1  # queries: three present ones found, of three absent ones one fired
    expected = (yes * no) / np.sqrt((yes + extra) * yes * (no + extra) * no)
    assert figures["words -> masks: IL_MCC"] == pytest.approx(expected)
    below = of_words(dataset, [*right, detection(1, 2, 0.4, masks[0])])
    assert below["absent words that return anything"] == 0 and below["words -> masks: IL_MCC"] == 1


def test_no_detections_give_zero(coco):
    figures = of_words(coco[0], [])
    assert figures["words -> masks: AP50"] == figures["words -> masks: cgF1"] == 0


def test_prompts_by_size_novelty_and_class():
    iou = {"box": 0.8, "click": 0.4, "three clicks": 0.6}
    row = {"iou": iou, "boundary": dict.fromkeys(iou, 0.5), "score": 0.7}
    right = {"rank": {"box": 0, "click": 3, "feature-crop": 9}, "class": 1, "split": "base", "size": "small"}
    wrong = {"rank": {"box": 5, "click": 4, "feature-crop": 0}, "class": 2, "split": "novel", "size": "large"}
    rows = [row | right, row | right, row | right, row | wrong]
    figures = summarise([{"image_id": 1, "prompts": {"seconds": 1.0, "objects": rows}}], None, 0.5)
    assert figures["box: mean IoU, small"] == pytest.approx(0.8) and np.isnan(figures["box: mean IoU, medium"])
    assert figures["box: boundary IoU, large"] == 0.5
    assert figures["name (box): top-1"] == 0.75 and figures["name (box): top-1, class average"] == 0.5
    assert figures["name (box): top-1, base"] == 1 and figures["name (click): top-1, base"] == 0
    assert figures["name (click): top-5, novel"] == 1 and figures["name (feature-crop): top-5, base"] == 0
    assert figures["name (feature-crop): top-1, novel"] == 1
    assert figures["name (box): calibration error"] == pytest.approx(0.05)


def test_everything_by_hand(coco):
    dataset, masks = coco
    found = [detection(2, 1, 0.9, masks[1]), detection(2, 2, 0.8, masks[1])]
    answers = {1: ([0.5], []), 2: ([1.0, 0.51], found)}  # an IoU of one half is not above it
    records = [
        {"image_id": i, "everything": {"seconds": 1, "iou": iou, "size": ["small"] * len(iou), "found": some}}
        for i, (iou, some) in answers.items()
    ]
    figures = summarise(records, EvalSet(dataset, Path()), 0.5)
    # The lower score has no pixels left, and both other objects are missed.
    assert figures["everything, named: PQ"] == pytest.approx((1 / (1 + 1 / 2) + 0) / 2)
    assert figures["everything, named: mIoU"] == pytest.approx((1 / 2 + 0) / 2)
    assert figures["everything: recall"] == figures["everything: recall, small"] == pytest.approx(2 / 3)
    assert figures["everything, named: AP50, base"] == pytest.approx(51 / 101)  # one of two objects of word 1
    assert figures["everything, named: AP50, novel"] == 0 and figures["everything: masks"] == 1


def test_maps_show_the_masks_above_the_objectness_threshold(coco):
    dataset, masks = coco
    found = [detection(1, 1, 0.2, masks[0]), detection(2, 1, 0.3, masks[1]), detection(2, 2, 0.4, masks[2])]
    lost = {**detection(2, 1, 0.9, masks[2]), "kept": False}  # it would cover the object of word 2
    records = [
        {
            "image_id": i,
            "everything": {
                "seconds": 1,
                "iou": [],
                "size": [],
                "found": [{"kept": True, **one} for one in [*found, lost] if one["image_id"] == i],
            },
        }
        for i in (1, 2)
    ]
    figures = summarise(records, EvalSet(dataset, Path()), 0.5)
    for name in ("PQ", "SQ", "RQ", "mIoU"):
        assert figures[f"everything, named: {name}"] == 1, name
    records[1]["everything"]["found"][-1]["kept"] = True
    assert summarise(records, EvalSet(dataset, Path()), 0.5)["everything, named: PQ"] < 0.6
