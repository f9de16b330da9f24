"""The yardstick itself: perfect answers get full marks, and known mistakes get known marks."""

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO

import ovsam
from ovsam.errors import InputError
from ovsam.evaluation import evaluate as evaluation

VAL = Path(__file__).parents[1] / "data" / "emojiscenes-val"


def test_three_clicks_are_better_than_one():
    """ovsam-tiny on held-out pictures, with the figures that `ovsam eval` prints besides."""
    figures = evaluation.measure(ovsam.load("ovsam-tiny", device="cpu"), COCO(str(VAL / "annotations.json")), VAL, 4)
    assert figures["three clicks: mean IoU"] > figures["click: mean IoU"] + 0.01
    assert 0.3 < figures["box: boundary IoU"] < figures["box: mean IoU"]
    assert 0 < figures["words -> masks: calibration error"] < 0.5
    assert 0 < figures["name (box): calibration error"] < 0.5
    assert set(evaluation.BESIDES) <= figures.keys()


def test_both_frozen_sets_are_measured_unless_one_is_named(coco, tmp_path, monkeypatch, capsys):
    asked, sets = [], {}
    for name, prefix in (("a", ""), ("b", "other: ")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "annotations.json").write_text("{}")
        sets[str(tmp_path / name)] = prefix
    model = type("Model", (), {"name": "m"})
    monkeypatch.setattr(evaluation, "DEFAULT_SETS", sets)
    monkeypatch.setattr(evaluation, "load", lambda name: model)
    monkeypatch.setattr(evaluation, "open_coco", lambda path: coco[0])
    monkeypatch.setattr(evaluation, "measure_time", lambda *_: {"seconds": 2.0})
    values = dict.fromkeys((*evaluation.BESIDES, "more"), 0.25)
    monkeypatch.setattr(evaluation, "measure", lambda segmenter, coco, folder, limit: asked.append(folder) or values)
    both = evaluation.run_eval(json_path=tmp_path / "figures.json")
    assert both == values | {"seconds": 2.0} | {f"other: {name}": 0.25 for name in evaluation.BESIDES}
    assert json.loads((tmp_path / "figures.json").read_text()) == both
    assert evaluation.run_eval(data=tmp_path / "b") == values | {"seconds": 2.0}
    assert asked == [tmp_path / "a", tmp_path / "b", tmp_path / "b"]
    with pytest.raises(InputError, match="no test set"):
        evaluation.run_eval(data=tmp_path)


@pytest.fixture
def coco():
    """Two pictures; word 1 in both, word 2 in the second alone, word 3 nowhere."""
    dataset, masks = COCO(), {}
    annotations = []
    for i, (image, word, x) in enumerate([(1, 1, 0), (2, 1, 5), (2, 2, 20)]):
        mask = np.zeros((40, 40), np.uint8, order="F")
        mask[5:30, x : x + 15] = 1
        code = rle.encode(mask)
        masks[i] = code
        box = rle.toBbox(code).tolist()
        fixed = {"id": i + 1, "image_id": image, "category_id": word, "iscrowd": 0, "area": int(mask.sum())}
        annotations.append({**fixed, "segmentation": code, "bbox": box})
    dataset.dataset = {
        "info": {},
        "images": [{"id": i, "width": 40, "height": 40} for i in (1, 2)],
        "categories": [{"id": i, "name": str(i), "split": "novel" if i == 2 else "base"} for i in (1, 2, 3)],
        "annotations": annotations,
    }
    dataset.createIndex()
    return dataset, masks


def detection(image, word, score, code):
    return {"image_id": image, "category_id": word, "score": score, "segmentation": code}


def test_perfect_answers_have_an_ap_of_one(coco):
    dataset, masks = coco
    found = [detection(1, 1, 0.9, masks[0]), detection(2, 1, 0.8, masks[1]), detection(2, 2, 0.7, masks[2])]
    figures = evaluation.average_precision(dataset, found, [1, 2])
    for split in ("", ", base", ", novel"):
        assert figures[f"words -> masks: AP50{split}"] == pytest.approx(1)


def test_a_false_positive_of_an_absent_word_costs_ap(coco):
    """Word 2 is not in picture 1: firing there, surer than in picture 2, halves its precision."""
    dataset, masks = coco
    right = [detection(1, 1, 0.9, masks[0]), detection(2, 1, 0.8, masks[1]), detection(2, 2, 0.7, masks[2])]
    figures = evaluation.average_precision(dataset, [*right, detection(1, 2, 0.95, masks[0])], [1, 2])
    assert figures["words -> masks: AP50, novel"] == pytest.approx(0.5)
    assert figures["words -> masks: AP50, base"] == pytest.approx(1)


def test_no_answers_score_nothing(coco):
    assert evaluation.average_precision(coco[0], [], [1, 2])["words -> masks: AP50"] == 0


def test_summary_splits_by_size_and_novelty():
    iou = {"box": 0.8, "click": 0.4, "three clicks": 0.6}
    row = {"iou": iou, "boundary": 0.5, "score": 0.7, "rank": {"box": 0, "click": 3, "feature-crop": 9}}
    rows = [{**row, "split": "base", "size": "small"}, {**row, "split": "novel", "size": "large"}]
    figures = evaluation.summarise(rows)
    assert figures["box: mean IoU, small"] == pytest.approx(0.8) and np.isnan(figures["box: mean IoU, medium"])
    assert figures["box: boundary IoU"] == 0.5 and figures["name (box): calibration error"] == pytest.approx(0.3)
    assert figures["name (box): top-1, base"] == 1 and figures["name (click): top-1, base"] == 0
    assert figures["name (click): top-5, novel"] == 1 and figures["name (feature-crop): top-5, base"] == 0


def test_a_plain_coco_json_is_completed_and_what_is_none_is_refused(tmp_path):
    square = {"id": 1, "image_id": 1, "category_id": 7, "segmentation": [[2, 3, 12, 3, 12, 8, 2, 8]]}
    crowd = {**square, "id": 2, "iscrowd": 1, "segmentation": {"size": [20, 20], "counts": [0, 400]}}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 20, "height": 20}],
        "categories": [{"id": 7, "name": "mat"}],
        "annotations": [square, crowd],
    }
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(content))
    plain = evaluation.open_coco(path)
    assert plain.anns[1]["bbox"] == [2, 3, 10, 5] and plain.anns[1]["area"] == 50 and plain.anns[1]["iscrowd"] == 0
    objects, masks = evaluation.true_objects(plain, 1)
    assert [a["id"] for a in objects] == [1] and masks.sum() == 50  # a crowd is no single thing
    path.write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(InputError, match="nothing to measure"):
        evaluation.open_coco(path)
    path.write_text("[1, 2]")
    with pytest.raises(InputError, match="no COCO json"):
        evaluation.open_coco(path)
    with pytest.raises(InputError, match="There is no file"):
        evaluation.open_coco(tmp_path / "nothing.json")


def test_absent_words_are_the_same_every_time_and_twenty_at_most():
    words = [str(i) for i in range(50)]
    first = evaluation.draw_absent(words, 3)
    assert first == evaluation.draw_absent(words, 3) != evaluation.draw_absent(words, 4)
    assert len(set(first)) == 20 and evaluation.draw_absent(["a"], 3) == ["a"]


@pytest.mark.parametrize(
    "name, found, better",
    [(0.02, 0.0, True), (0.0, 0.0, False), (0.005, 0.005, False), (0.2, -0.02, False), (-0.005, 0.02, True)],
)
def test_a_tuned_model_must_gain_and_lose_nothing(coco, tmp_path, monkeypatch, capsys, name, found, better):
    """Less than MARGIN is no difference."""
    change = dict(zip(evaluation.DECISIVE, (name, found), strict=True))
    figures = {model: dict.fromkeys(evaluation.COMPARED, 0.5) for model in ("base", "tuned")}
    figures["tuned"] |= {key: 0.5 + value for key, value in change.items()}
    monkeypatch.setattr(evaluation, "load", lambda model, device: model)
    monkeypatch.setattr(evaluation, "open_coco", lambda path: coco[0])
    monkeypatch.setattr(evaluation, "measure", lambda model, *_: figures[model])
    assert evaluation.run_compare("base", "tuned", data="x.json", json_path=tmp_path / "both.json") is better
    assert ("does not beat" not in capsys.readouterr().out) is better
    assert json.loads((tmp_path / "both.json").read_text())["base"] == figures["base"]
