"""The pipeline task finds the instances that the Segmenter finds."""

from pathlib import Path

import pytest
from transformers import pipeline

import ovsam
from ovsam.checkpoints.embedded import find_checkpoint

SCENE = Path(__file__).parents[1] / "data" / "emojiscenes-val" / "images" / "028.jpg"
WORDS = ["car", "saxophone", "dog face"]


@pytest.mark.parametrize("threshold", [0.001, 0.3])
def test_a_low_threshold_lowers_that_of_proposals(threshold):
    asked = pipeline(ovsam.TASK, model=str(find_checkpoint()), device="cpu")
    found = asked(str(SCENE), text=WORDS, threshold=threshold)
    want = ovsam.load("ovsam-tiny", device="cpu").where(SCENE, WORDS, threshold=threshold)
    assert [one["label"] for one in found] == want.labels
    assert [one["score"] for one in found] == pytest.approx(list(want.scores), abs=1e-5)
