"""The pipeline task answers as the model does, and finds the instances that the Segmenter finds."""

import numpy as np
import pytest
from common import picture
from transformers import pipeline

import ovsam
from ovsam.errors import InputError

IMAGE = picture(1, width=200, height=90)
BOX = [30, 30, 100, 80]


@pytest.fixture
def segment(tiny_folder):
    return pipeline(ovsam.TASK, model=str(tiny_folder), device="cpu")


@pytest.mark.parametrize("threshold", [0.001, 0.5])
def test_it_equals_the_segmenter(segment, tiny_folder, threshold):
    """A low threshold lowers that of proposals, too."""
    found = segment(IMAGE, text=["cat", "dog"], threshold=threshold)
    expected = ovsam.load(tiny_folder, device="cpu").where(IMAGE, ["cat", "dog"], threshold=threshold)
    assert [one["label"] for one in found] == expected.labels and len(found) > 3
    assert [one["score"] for one in found] == pytest.approx(list(expected.scores), abs=1e-5)
    assert (np.stack([one["mask"] for one in found]) == expected.masks).mean() > 0.9999
    sides = [[one["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")] for one in found]
    assert np.abs(np.array(sides) - np.array([one.box for one in expected])).max() <= 1


def test_prompts_and_everything(segment, tiny_folder):
    segmenter = ovsam.load(tiny_folder, device="cpu")
    (named,) = segment(IMAGE, text=["cat", "dog"], input_boxes=[[BOX]])
    expected = segmenter.what(IMAGE, boxes=[BOX], vocabulary=["cat", "dog"])[0]
    assert named["label"] == expected.label
    scores = [named["score"], named["mask_score"]]
    assert scores == pytest.approx([expected.score, expected.mask_score], abs=1e-4)
    assert len(segment(IMAGE)) == len(segmenter.everything(IMAGE)) > 3


def test_images_come_as_lists_and_paths(segment, tmp_path):
    assert len(segment([IMAGE, picture()], text="cat")) == 2
    IMAGE.save(tmp_path / "picture.png")
    by_path = segment(str(tmp_path / "picture.png"), text="cat")
    assert [one["score"] for one in by_path] == [one["score"] for one in segment(IMAGE, text="cat")]
    with pytest.raises(InputError, match="words"):
        segment(IMAGE, words=["cat"])


def test_thresholds_are_those_of_the_model(segment):
    segment.model.config.score_threshold, segment.model.config.objectness_threshold = 0.3, 0.4
    named, unnamed = segment(picture(), text=["cat", "dog"]), segment(picture())
    assert 0.3 <= min(one["score"] for one in named) < 0.4 <= min(one["score"] for one in unnamed)
