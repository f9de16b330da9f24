"""Average precision: to the last digit that of pycocotools and lvis on random data, known values by hand, and rules
that hold for any data."""

import contextlib
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ovsam.evaluation import metrics_ap as ap
from ovsam.ops import rle

SIDE = 160


def box_mask(x: int, y: int, w: int, h: int, side: int = SIDE) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[y : y + h, x : x + w] = True
    return mask


def annotation(number, image, class_id, mask, crowd=0):
    code = rle.encode(mask)
    fixed = {"id": number, "image_id": image, "category_id": class_id, "iscrowd": crowd, "segmentation": code}
    return fixed | {"area": float(rle.area(code)), "bbox": list(rle.bbox(code))}


def random_set(seed: int, crowds: bool = True):
    """Objects of three sizes, crowds, and detections near them, elsewhere, of wrong classes and of equal scores."""
    rng = np.random.default_rng(seed)
    objects, found = [], []
    for image in range(1, 13):
        for _ in range(rng.integers(0, 7)):
            w, h = rng.integers(4, 120, 2)
            x, y = rng.integers(0, SIDE - w), rng.integers(0, SIDE - h)
            class_id = int(rng.integers(1, 5))
            crowd = int(crowds and rng.random() < 0.15)
            objects.append(annotation(len(objects) + 1, image, class_id, box_mask(x, y, w, h), crowd))
            for _ in range(rng.integers(0, 4)):
                dx, dy = rng.integers(-6, 7, 2)
                near = box_mask(max(x + dx, 0), max(y + dy, 0), w, h)
                guess = class_id if rng.random() < 0.8 else int(rng.integers(1, 5))
                found.append((image, guess, round(float(rng.random()), 1), near))
        for _ in range(3):
            found.append(
                (image, int(rng.integers(1, 5)), round(float(rng.random()), 1), box_mask(*rng.integers(4, 60, 4)))
            )
    detections = [
        {"image_id": i, "category_id": c, "score": s, "segmentation": rle.encode(mask)} for i, c, s, mask in found
    ]
    return objects, detections


def dataset(objects, classes=4, images=12, **more):
    return {
        "images": [{"id": i, "width": SIDE, "height": SIDE, **more} for i in range(1, images + 1)],
        "categories": [{"id": i, "name": str(i)} for i in range(1, classes + 1)],
        "annotations": objects,
    }


def pycocotools(objects, detections) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = dataset(objects)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes([dict(one) for one in detections]), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:6]


@pytest.mark.parametrize("seed", range(4))
def test_ap_is_that_of_pycocotools(seed):
    objects, detections = random_set(seed)
    own = ap.average_precision(ap.Truth(objects), ap.strongest(detections, ap.COCO_CAP, ap.by_image_and_class))
    assert 0.1 < own["AP"] < 0.9
    assert list(own.values()) == pytest.approx(pycocotools(objects, detections).tolist(), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_lvis_ap_is_that_of_lvis(seed, tmp_path, monkeypatch):
    lvis = pytest.importorskip("lvis")
    monkeypatch.setattr(np, "float", float, raising=False)  # lvis 0.5.3 is older than numpy 1.24
    objects, detections = random_set(seed, crowds=False)
    data = dataset(objects)
    rng = np.random.default_rng(seed)
    searched, lenient = {}, {}
    for image in data["images"]:
        shown = {one["category_id"] for one in objects if one["image_id"] == image["id"]}
        absent = [i for i in range(1, 5) if i not in shown and rng.random() < 0.5]
        image["neg_category_ids"] = absent
        image["not_exhaustive_category_ids"] = [i for i in shown if rng.random() < 0.3]
        searched[image["id"]], lenient[image["id"]] = shown | set(absent), set(image["not_exhaustive_category_ids"])
    frequency = {1: "r", 2: "c", 3: "f", 4: "f"}
    for category in data["categories"]:
        category |= {"frequency": frequency[category["id"]], "image_count": 1, "instance_count": 1}
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(data))
    truth = lvis.LVIS(str(path))
    evaluation = lvis.LVISEval(truth, lvis.LVISResults(truth, [dict(one) for one in detections]), "segm")
    evaluation.run()
    theirs = evaluation.get_results()
    kept = ap.strongest(detections, ap.LVIS_CAP, ap.by_image)
    own_truth = ap.Truth(objects, searched, lenient)
    own = ap.average_precision(own_truth, kept) | ap.frequency_precision(own_truth, kept, frequency)
    pairs = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "AP, small": "APs", "AP, medium": "APm", "AP, large": "APl"}
    pairs |= {"AP, rare": "APr", "AP, common": "APc", "AP, frequent": "APf"}
    for name, key in pairs.items():
        assert own[name] == pytest.approx(theirs[key], abs=1e-12), name


def test_rules_of_partial_annotation_by_hand():
    """A detection of a class that was not looked for is left out; one of a lenient class counts neither way."""
    mask, beside = box_mask(10, 10, 40, 40), box_mask(90, 90, 40, 40)
    objects = [annotation(1, 1, 1, mask)]
    right = {"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": rle.encode(mask)}
    wrong = right | {"score": 0.9, "segmentation": rle.encode(beside)}
    elsewhere = wrong | {"image_id": 2}
    found = [right, wrong, elsewhere]

    def score(searched, lenient=None):
        return ap.average_precision(ap.Truth(objects, searched, lenient or {}), found)["AP"]

    assert score(None) == pytest.approx(1 / 3)
    assert score({1: {1}, 2: {1}}) == pytest.approx(1 / 3)
    assert score({1: {1}, 2: set()}) == pytest.approx(1 / 2)
    assert score({1: {1}, 2: set()}, {1: {1}}) == pytest.approx(1)


def test_boundary_ap_by_hand():
    """Two squares of 100 with a rim that is one pixel off: mask IoU 0.96, boundary IoU (5 px wide) about 0.67."""
    mask, smaller = box_mask(20, 20, 100, 100), box_mask(21, 21, 98, 98)
    objects = [annotation(1, 1, 1, mask)]
    found = [{"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": rle.encode(smaller)}]
    one, two = 100**2 - 90**2, 98**2 - 88**2
    shared = 98**2 - 90**2
    expected = shared / (one + two - shared)
    assert ap.boundary_mask_iou([found[0]["segmentation"]], [objects[0]["segmentation"]], np.zeros(1, bool)) == expected
    plain = ap.average_precision(ap.Truth(objects), found)
    edges = ap.average_precision(ap.Truth(objects), found, ap.boundary_mask_iou)
    assert plain["AP"] == pytest.approx(1)
    assert edges["AP"] == pytest.approx((ap.THRESHOLDS <= expected).mean()) and edges["AP"] < 0.5


def test_ap_fixed_has_no_cap_an_image_and_one_a_class():
    mask = rle.encode(box_mask(0, 0, 30, 30))
    some = [{"image_id": i % 2, "category_id": i % 3, "score": i / 100, "segmentation": mask} for i in range(60)]
    kept = ap.strongest(some, 5, ap.by_class)
    assert [one["score"] for one in kept if one["category_id"] == 0] == [0.57, 0.54, 0.51, 0.48, 0.45]
    assert len(kept) == 15 and len(ap.strongest(some, 5, ap.by_image)) == 10


def test_ap_pool_depends_on_the_calibration_across_classes():
    """Each class ranks its own detections well, but a false one of the first outscores the true one of the second."""
    masks = [box_mask(x, 0, 30, 30) for x in (0, 40, 80)]
    codes = [rle.encode(mask) for mask in masks]
    objects = [annotation(1, 1, 1, masks[0]), annotation(2, 1, 2, masks[1])]
    found = [
        {"image_id": 1, "category_id": class_id, "score": score, "segmentation": codes[place]}
        for class_id, score, place in ((1, 0.9, 0), (1, 0.8, 2), (2, 0.3, 1))
    ]
    figures = ap.frequency_precision(ap.Truth(objects), found, {1: "f", 2: "r"})
    assert figures["AP"] == pytest.approx(1) == figures["AP, rare"] and np.isnan(figures["AP, common"])
    # Recalls up to one half have precision 1 (51 of the 101), the others 2/3.
    assert figures["AP-pool"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_no_detection_and_no_object():
    objects, _ = random_set(0)
    assert ap.average_precision(ap.Truth(objects), [])["AP"] == 0
    assert np.isnan(ap.average_precision(ap.Truth([]), [])["AP"])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_properties(seed):
    objects, detections = random_set(seed % 1000)
    truth = ap.Truth(objects)
    rng = np.random.default_rng(seed)
    detections = [one | {"score": float(rng.random())} for one in detections]  # ties have an order
    score = ap.average_precision(truth, detections)["AP"]
    mixed = [detections[i] for i in rng.permutation(len(detections))]
    assert ap.average_precision(truth, mixed)["AP"] == pytest.approx(score, nan_ok=True)
    again = [one | {"score": one["score"] * 0.999} for one in detections]
    doubled = ap.average_precision(truth, detections + again)["AP"]
    assert np.isnan(score) or doubled <= score + 1e-9
    perfect = [{**one, "score": 0.5} for one in objects if not one["iscrowd"]]
    assert ap.average_precision(truth, perfect)["AP"] == pytest.approx(1, nan_ok=True)
    assert ap.average_precision(truth, perfect, ap.boundary_mask_iou)["AP"] == pytest.approx(1, nan_ok=True)
