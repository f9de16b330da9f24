"""Floors of the shipped checkpoints, on held-out images. A new checkpoint changes the tables at the top, nothing else;
behaviour that does not depend on trained weights is tested elsewhere, on tiny random models."""

import numpy as np
import pytest
import torch
from common import VAL
from PIL import Image
from pycocotools import mask as coco_mask

import ovsam
from ovsam.checkpoints.embedded import VARIANT, find_checkpoint
from ovsam.evaluation.datasets import EvalSet
from ovsam.evaluation.evaluate import measure
from ovsam.evaluation.timing import measure_time
from ovsam.inference.proposers import get_proposer

pytestmark = [pytest.mark.weights, pytest.mark.slow]

IMAGES = 24  # of the frozen set; floors are a little below what `ovsam eval` prints for the whole of it
FLOORS = {
    "ovsam-tiny": {
        "box: mean IoU": 0.74,
        "box: boundary IoU": 0.3,
        "click: mean IoU": 0.62,
        "name (box): top-1, base": 0.50,
        "name (box): top-5, novel": 0.05,  # chance is 0.004
        "words -> masks: AP50": 0.50,
        "synonyms that find their object": 0.25,
    },
    VARIANT: {
        "box: mean IoU": 0.71,
        "click: mean IoU": 0.60,
        "name (box): top-1, base": 0.50,
        "words -> masks: AP50": 0.50,
    },
}
CEILINGS = {
    "absent words that return anything": 0.10,
    "words -> masks: calibration error": 0.5,
    "name (box): calibration error": 0.5,
}
# One scene: an object that the checkpoint finds surely, its box, and the least score it has; a word that shares no
# object with it, and one whose only match is better named otherwise.
SCENE, OBJECT, BOX, PRESENCE = "028.jpg", "car", [145, 37, 215, 89], 0.8
ELSEWHERE, MISNAMED, RIGHT_NAME = "saxophone", "dog", "dog face"
NAMES = [OBJECT, ELSEWHERE, RIGHT_NAME]


def overlap(one, other) -> float:
    return float((one & other).sum() / (one | other).sum())


@pytest.fixture(scope="module")
def scene(ovsam_tiny):
    return ovsam_tiny.encode(VAL / "images" / SCENE)


@pytest.fixture(scope="module")
def found(ovsam_tiny, scene):
    """The object of the scene, as its word finds it."""
    return ovsam_tiny.where(scene, [OBJECT])[0]


# ---- figures


@pytest.mark.parametrize("name", FLOORS)
def test_figures(name, ovsam_tiny, val):
    segmenter = ovsam_tiny if name == "ovsam-tiny" else ovsam.load(name, device="cpu")
    figures = measure(segmenter, val, VAL, limit=IMAGES, baselines=False)
    for figure, floor in FLOORS[name].items():
        assert figures[figure] > floor, (figure, figures[figure])
    if name == "ovsam-tiny":
        for figure, ceiling in CEILINGS.items():
            assert figures[figure] < ceiling, (figure, figures[figure])
        assert figures["three clicks: mean IoU"] > figures["click: mean IoU"] + 0.01
        assert figures["box: boundary IoU"] < figures["box: mean IoU"]


def test_many_words_cost_little(ovsam_tiny, val):
    """20,000 cached words against one where the instances are the same, when naming everything. In words mode, where
    more words find more to refine, `ovsam eval` prints about 3: the target of 1.5 is missed there and not asserted."""
    figures = measure_time(ovsam_tiny, EvalSet(val, VAL), repeats=5)
    assert figures["20,000 words / 1 word, naming everything"] < 1.5


def test_prototypes_improve_masks_of_boxes(ovsam_tiny, val):
    """On four images, against the decoder alone."""
    model, weight = ovsam_tiny.model, ovsam_tiny.model.config.prototype_weight
    ious = {0.0: [], weight: []}
    assert len(ious) == 2
    for image in list(val.imgs.values())[:4]:
        objects = val.loadAnns(val.getAnnIds(image["id"]))
        truth = np.stack([coco_mask.decode(one["segmentation"]).astype(bool) for one in objects])
        features = ovsam_tiny.encode(VAL / image["file_name"]).features
        boxes = torch.tensor([[[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in objects)]])
        for value in ious:
            model.config.prototype_weight = value
            masks = model(features=features, input_boxes=boxes).pred_masks[:, :, 0].detach()
            drawn = torch.nn.functional.interpolate(masks, truth.shape[1:], mode="bilinear")[0].numpy() > 0
            ious[value] += [overlap(one, own) for one, own in zip(drawn, truth, strict=True)]
    model.config.prototype_weight = weight
    assert np.mean(ious[weight]) > np.mean(ious[0.0]) + 0.005


# ---- the files


@pytest.mark.parametrize("name", FLOORS)
def test_weights_are_finite_complete_and_float32(name):
    model, report = ovsam.OVSamModel.from_pretrained(find_checkpoint(name), output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.isfinite(t).all() and t.dtype in (torch.float32, torch.int64) for t in model.state_dict().values())


# ---- one scene


def test_presence(ovsam_tiny, scene):
    sure = ovsam_tiny.where(scene, [OBJECT, ELSEWHERE], threshold=0.99)
    assert len(sure) == 0 and PRESENCE < sure.presence[OBJECT] < 0.99
    assert sure.presence[ELSEWHERE] < sure.presence[OBJECT]


def test_a_negative_word_takes_its_object_away(ovsam_tiny, scene):
    plain = ovsam_tiny.where(scene, [MISNAMED])
    told = ovsam_tiny.where(scene, [MISNAMED], negative=[RIGHT_NAME])
    assert len(plain) == 1 and len(told) == 0
    assert [(one["text_label"], one["negative"]) for one in told.dropped] == [(MISNAMED, RIGHT_NAME)]


def test_prompts_and_exemplars(ovsam_tiny, scene, found):
    (boxed,) = ovsam_tiny.what(scene, boxes=[BOX], vocabulary=NAMES)
    (clicked,) = ovsam_tiny.what(scene, points=[[(BOX[0] + BOX[2]) / 2, (BOX[1] + BOX[3]) / 2]], vocabulary=NAMES)
    assert boxed.label == clicked.label == OBJECT and overlap(boxed.mask, found.mask) > 0.8
    alike = ovsam_tiny.where(scene, exemplars=[found.box])
    assert alike[0].label == "exemplar" and overlap(alike[0].mask, found.mask) > 0.8


def test_a_rough_mask_gives_the_exact_one(ovsam_tiny, scene, found):
    rough = torch.from_numpy(found.mask).float()[None, None]
    rough = torch.nn.functional.max_pool2d(rough, 9, 1, 4)[0] > 0  # four pixels too large all around
    (exact,) = ovsam_tiny.what(scene, masks=rough, vocabulary=NAMES)
    assert exact.label == OBJECT and overlap(exact.mask, found.mask) > overlap(rough[0].numpy(), found.mask)
    unrefined = ovsam_tiny.where(scene, [OBJECT], refine=False)[0]
    assert 0.7 < overlap(unrefined.mask, found.mask) < 1


def test_edges_run_along_the_object(ovsam_tiny, scene, found):
    edges, mask = ovsam_tiny.edges(scene), torch.from_numpy(found.mask).float()[None, None]
    rim = torch.nn.functional.max_pool2d(mask, 9, 1, 4) + torch.nn.functional.max_pool2d(-mask, 9, 1, 4) > 0
    # Far more than anywhere, up to the strongest; edges of its parts lie inside.
    assert edges[rim[0, 0]].mean() > 4 * edges.mean() and edges[rim[0, 0]].max() > 0.9


def test_an_object_across_the_seams_of_tiles_is_found_once(ovsam_tiny, found):
    large = Image.new("RGB", (1024, 640), "gray")
    x, y = 380, 90  # the object lies across columns 525 to 595: seams are at 512 and 640
    large.paste(Image.open(VAL / "images" / SCENE), (x, y))
    there = np.zeros((640, 1024), dtype=bool)
    there[y : y + 512, x : x + 512] = found.mask
    tiled = ovsam_tiny.where(large, [OBJECT], tile=512)
    assert sum(overlap(one.mask, there) > 0.5 for one in tiled) == 1


def test_bfloat16_finds_the_same(scene, found):
    half = ovsam.load("ovsam-tiny", device="cpu", dtype="bfloat16")
    assert overlap(half.where(scene.image, [OBJECT])[0].mask, found.mask) > 0.9


def test_other_proposers_find_the_object(ovsam_tiny, scene, found):
    def small_grid(question):  # looser than for a large decoder, whose masks are more stable
        return get_proposer("grid")(question, points_per_side=12, pred_iou_threshold=0.7, stability_threshold=0.8)

    for proposer in ("clip-dense", small_grid):
        results = ovsam_tiny.where(scene, [OBJECT], proposer=proposer, threshold=0.0)
        assert max((one.mask & found.mask).sum() / found.area for one in results) > 0.5
