"""`ovsam eval` with a small random model: questions, outputs, and interrupted evaluations."""

import json
from pathlib import Path

import numpy as np
import pytest
from common import picture, tiny_model, tiny_processor

from ovsam.errors import InputError
from ovsam.evaluation import evaluate
from ovsam.evaluation.datasets import open_set
from ovsam.evaluation.metrics import boundary_iou
from ovsam.evaluation.tasks import Examiner
from ovsam.inference.segmenter import Segmenter

WORDS = ("cat", "dog", "cup", "car (automobile)")


@pytest.fixture(scope="module")
def segmenter():
    return Segmenter(tiny_model(), tiny_processor(), "tiny")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    annotations = []
    for image in (1, 2, 3):
        picture(image).save(folder / f"{image}.png")
        for x, y, side, word in ((10, 10, 30, 1), (50, 40, 60, 2), (70, 5, 20, 1)):
            corners = [x, y, x + side, y, x + side, y + side, x, y + side]
            number = {"id": len(annotations) + 1, "image_id": image, "category_id": word, "iscrowd": 0}
            annotations.append(number | {"segmentation": [corners], "bbox": [x, y, side, side], "area": side**2})
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 128, "height": 128} for i in (1, 2, 3)],
        "categories": [{"id": i, "name": word} for i, word in enumerate(WORDS, 1)],
        "annotations": annotations,
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


def test_prompts_equal_the_results_of_the_segmenter(segmenter, dataset):
    data = open_set(dataset)
    record = Examiner(segmenter, data).ask(1, ("prompts",))
    objects, truth = data.objects(1)
    boxes = [[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in objects)]
    found = segmenter.what(dataset / "1.png", boxes=boxes, vocabulary=list(WORDS), top_k=4)
    for row, one, mask, annotation in zip(record["prompts"]["objects"], found, truth, objects, strict=True):
        expected = (one.mask & mask).sum() / (one.mask | mask).sum()
        assert row["iou"]["box"] == pytest.approx(expected)
        assert row["boundary"]["box"] == pytest.approx(boundary_iou(one.mask, mask))
        names = [name for name, _ in one.topk]
        assert row["rank"]["box"] == names.index(data.words[annotation["category_id"]])
        assert row["score"] == pytest.approx(one.score) and row["name"] == one.label
        assert {"feature-crop", "image-crop", "box, large"} <= row["rank"].keys()  # all four are words of LVIS


def test_words_and_everything_equal_the_results_of_the_segmenter(segmenter, dataset):
    data = open_set(dataset)
    examiner = Examiner(segmenter, data)
    record = examiner.ask(2, ("words", "everything"))
    assert set(record["words"]["present"]) == {1, 2} and set(record["words"]["absent"]) == {3, 4}
    found = segmenter.where(dataset / "2.png", list(WORDS), threshold=examiner.floor)
    for kind, results in (("words", found), ("everything", segmenter.everything(dataset / "2.png", list(WORDS), 0, 0))):
        scores = [one["score"] for one in record[kind]["found"]]
        assert sorted(scores) == pytest.approx(sorted(one.score for one in results), abs=1e-5) and len(scores)
    assert len(record["everything"]["iou"]) == 3 and max(record["everything"]["iou"]) <= 1
    assert record["words"]["clip-dense"]


def test_baselines_can_be_left_out(segmenter, dataset):
    record = Examiner(segmenter, open_set(dataset), baselines=False).ask(1, evaluate.QUESTIONS)
    assert "clip-dense" not in record["words"]
    assert record["prompts"]["objects"][0]["rank"].keys() == {"box", "click", "box, large"}


@pytest.mark.slow
def test_a_stopped_evaluation_goes_on(segmenter, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "load", lambda name, device: segmenter)
    whole = evaluate.run_eval(dataset, "m", output=tmp_path / "a", json_path=tmp_path / "a.json")
    written = json.loads((tmp_path / "a.json").read_text())
    assert written == json.loads((tmp_path / "a" / "results.json").read_text())
    assert written["pictures"] == 3 and written["model"] == "m" and written["command"].startswith("ovsam")
    shown = capsys.readouterr().out
    for name, value in whole.items():
        assert np.isnan(value) or written["figures"][name] == round(value, 4)
    row = next(line for line in shown.splitlines() if line.startswith("box: mean IoU"))
    values = [whole[f"box: mean IoU{part}"] for part in ("", ", class average", ", base", ", small", ", medium")]
    assert row.split()[3:] == [f"{value:.3f}" for value in values]
    page = (tmp_path / "a" / "report.html").read_text()
    records = [json.loads(line) for line in (tmp_path / "a" / "records.jsonl").read_text().splitlines()[1:]]
    misnamed = sum(any(row["rank"]["box"] for row in one["prompts"]["objects"]) for one in records)
    assert page.count("<img") == 3 + 3 + misnamed and page.count("<svg") == 3 and "http" not in page

    lines = (tmp_path / "a" / "records.jsonl").read_text().splitlines()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "records.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[2][:50])  # killed in the second
    asked = []
    own = Examiner.ask
    monkeypatch.setattr(Examiner, "ask", lambda self, image, tasks: asked.append(image) or own(self, image, tasks))
    again = evaluate.run_eval(dataset, "m", output=tmp_path / "b")
    assert asked == [2, 3]
    same = {name for name in whole if "seconds" not in name and "20,000" not in name}
    assert {n: again[n] for n in same} == pytest.approx({n: whole[n] for n in same}, nan_ok=True)
    with pytest.raises(InputError, match="has another evaluation"):
        evaluate.run_eval(dataset, "m", output=tmp_path / "b", absent=1)


def test_tasks_and_the_limit(segmenter, dataset, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "load", lambda name, device: segmenter)
    figures = evaluate.run_eval(dataset, "m", tasks=["words"], limit=2, baselines=False)
    assert {name.split(":")[0] for name in figures} == {
        "words -> masks",
        "absent words that return anything",
        "seconds",
    }
    assert "2 images" in capsys.readouterr().out


def test_lvis_images_are_queried_for_their_annotated_classes(segmenter, dataset, tmp_path, monkeypatch, capsys):
    content = json.loads((dataset / "annotations.json").read_text())
    for image in content["images"]:
        image |= {"neg_category_ids": [3], "not_exhaustive_category_ids": [1]}
    for category, frequency in zip(content["categories"], "rcff", strict=True):
        category["frequency"] = frequency
    (tmp_path / "lvis.json").write_text(json.dumps(content))
    monkeypatch.setattr(evaluate, "load", lambda name, device: segmenter)
    asked = {"tasks": ["words"], "baselines": False, "output": tmp_path / "out"}
    figures = evaluate.run_eval(tmp_path / "lvis.json", "m", images=dataset, **asked)
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()[1:]]
    assert all(one["words"]["absent"] == [3] for one in records)
    named = {name.removeprefix("words -> masks: ") for name in figures}
    assert {"AP-fixed", "AP, rare", "AP, common", "AP-pool, rare"} <= named
    assert np.isnan(figures["words -> masks: AP, frequent"])  # no image shows one
    assert figures["words -> masks: AP, novel"] == figures["words -> masks: AP, rare"]


def test_an_image_of_another_size_raises_an_error(segmenter, dataset, tmp_path):
    picture(1, 64, 64).save(tmp_path / "1.png")
    with pytest.raises(InputError, match="has another size"):
        Examiner(segmenter, open_set(dataset / "annotations.json", tmp_path)).ask(1, ("words",))
