"""Floors of the shipped checkpoint, on held-out photographs and pictograms. A new checkpoint changes the tables at the
top, nothing else; behaviour that does not depend on trained weights is tested elsewhere, on tiny random models."""

import pytest
import torch
from common import ROOT, VAL

import ovsam
from ovsam.checkpoints.embedded import find_checkpoint
from ovsam.evaluation.datasets import EvalSet, open_set
from ovsam.evaluation.evaluate import measure
from ovsam.evaluation.timing import measure_time

pytestmark = [pytest.mark.weights, pytest.mark.slow]

PHOTOS = ROOT / "tests" / "data" / "photos-val"
IMAGES = 12  # of each frozen set; floors are below the figures of `ovsam eval` on the whole set
FLOORS = {
    PHOTOS: {
        "box: mean IoU": 0.62,
        "name (box): top-1": 0.45,  # of COCO's 80 words
        "words -> masks: AP50": 0.15,
    },
    VAL: {
        "box: mean IoU": 0.78,
        "name (box): top-1, base": 0.05,  # of 1,373 words
    },
}
CEILINGS = {PHOTOS: {"absent words that return anything": 0.03}, VAL: {}}
# One photograph: an object that the checkpoint finds surely, its box, and a word that it does not show.
SCENE, OBJECT, BOX, ELSEWHERE = "000000000599.jpg", "cat", [1, 30, 330, 323], "airplane"
NAMES = [OBJECT, ELSEWHERE, "couch"]


def overlap(one, other) -> float:
    return float((one & other).sum() / (one | other).sum())


@pytest.fixture(scope="module")
def scene(ovsam_tiny):
    return ovsam_tiny.encode(PHOTOS / "images" / SCENE)


@pytest.fixture(scope="module")
def found(ovsam_tiny, scene):
    """The object of the scene, as its word finds it."""
    return ovsam_tiny.where(scene, [OBJECT])[0]


# ---- figures


@pytest.mark.parametrize("folder", FLOORS, ids=lambda folder: folder.name)
def test_figures(folder, ovsam_tiny):
    data = open_set(folder)
    tasks = ("prompts", "words") if folder == PHOTOS else ("prompts",)
    figures = measure(ovsam_tiny, data.coco, data.folder, IMAGES, tasks, baselines=False)
    for figure, floor in FLOORS[folder].items():
        assert figures[figure] > floor, (figure, figures[figure])
    for figure, ceiling in CEILINGS[folder].items():
        assert figures[figure] < ceiling, (figure, figures[figure])
    if folder == PHOTOS:
        assert figures["three clicks: mean IoU"] > figures["click: mean IoU"]
    assert figures["box: boundary IoU"] < figures["box: mean IoU"]


def test_many_words_cost_little(ovsam_tiny, val):
    """20,000 cached words against one where the instances are the same, when naming everything. In words mode, where
    more words find more to refine, `ovsam eval` prints about 3: the target of 1.5 is missed there and not asserted."""
    figures = measure_time(ovsam_tiny, EvalSet(val, VAL), repeats=5)
    assert figures["20,000 words / 1 word, naming everything"] < 1.5


# ---- the files


def test_weights_are_finite_complete_and_float32():
    model, report = ovsam.OVSamModel.from_pretrained(find_checkpoint(), output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.isfinite(t).all() and t.dtype in (torch.float32, torch.int64) for t in model.state_dict().values())


# ---- one photograph


def test_presence(ovsam_tiny, scene):
    none = ovsam_tiny.where(scene, [OBJECT, ELSEWHERE], threshold=0.999)
    assert len(none) == 0 and none.presence[ELSEWHERE] < none.presence[OBJECT] < 0.999


def test_prompts_and_exemplars(ovsam_tiny, scene, found):
    (boxed,) = ovsam_tiny.what(scene, boxes=[BOX], vocabulary=NAMES)
    (clicked,) = ovsam_tiny.what(scene, points=[[(BOX[0] + BOX[2]) / 2, (BOX[1] + BOX[3]) / 2]], vocabulary=NAMES)
    assert boxed.label == clicked.label == OBJECT
    alike = ovsam_tiny.where(scene, exemplars=[found.box], threshold=0.001)
    assert alike[0].label == "exemplar" and max(overlap(one.mask, found.mask) for one in alike) > 0.5


def test_bfloat16_finds_the_same(scene, found):
    half = ovsam.load("ovsam-tiny", device="cpu", dtype="bfloat16")
    assert max(overlap(one.mask, found.mask) for one in half.where(scene.image, [OBJECT])) > 0.8
