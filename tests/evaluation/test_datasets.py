"""Data sets of evaluation: completed fields, errors, absent and held-out words, partial annotation."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovsam.errors import InputError
from ovsam.evaluation.datasets import COCO_IN_LVIS, EvalSet, open_coco, open_set
from ovsam.processing.vocabulary import Vocabulary

PHOTOS = Path(__file__).parents[1] / "data" / "photos-val"
SQUARE = {"id": 1, "image_id": 1, "category_id": 7, "segmentation": [[2, 3, 12, 3, 12, 8, 2, 8]]}


def write(folder: Path, **more) -> Path:
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 20, "height": 20}],
        "categories": [{"id": 7, "name": "mat"}],
        "annotations": [SQUARE],
    }
    path = folder / "coco.json"
    path.write_text(json.dumps(content | more))
    return path


def test_a_plain_coco_json_is_completed(tmp_path):
    crowd = SQUARE | {"id": 2, "iscrowd": 1, "segmentation": {"size": [20, 20], "counts": [0, 400]}}
    data = open_set(write(tmp_path, annotations=[SQUARE, crowd]))
    assert data.coco.anns[1]["bbox"] == [2, 3, 10, 5] and data.coco.anns[1]["area"] == 50
    objects, masks = data.objects(1)
    assert [one["id"] for one in objects] == [1] and masks.sum() == 50  # a crowd is no single object
    assert [one["iscrowd"] for one in data.truth([1]).objects] == [0, 1]


def test_other_paths_than_data_sets_raise_an_error(tmp_path):
    with pytest.raises(InputError, match="must have both"):
        open_coco(write(tmp_path, annotations=[]))
    (tmp_path / "list.json").write_text("[1, 2]")
    for name, sentence in (
        ("list.json", "must be a JSON file of COCO"),
        ("nothing.json", "There is no JSON file"),
        ("", "not a test set"),
    ):
        with pytest.raises(InputError, match=sentence):
            open_set(tmp_path / name)
    path = write(tmp_path)
    with pytest.raises(InputError, match="There is no folder"):
        open_set(path, tmp_path / "nowhere")
    with pytest.raises(InputError, match="There is no image 'a.png'"):
        open_set(path).picture(1)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "a.png")
    assert open_set(path).picture(1) == tmp_path / "images" / "a.png"


def test_absent_words_are_the_same_every_time():
    data = open_set(PHOTOS)
    first, second = sorted(data.coco.imgs)[:2]
    shown = {one["category_id"] for one in data.coco.imgToAnns[first]}
    assert data.absent(first) == data.absent(first) != data.absent(second)
    assert len(set(data.absent(first))) == 10 and not shown & set(data.absent(first))
    assert set(data.absent(first, None)) | shown == set(data.words) and data.absent(first, 0) == []


def test_the_photographs():
    data = open_set(PHOTOS)
    split = list(data.split.values())
    assert len(data.coco.imgs) == 60 and (split.count("base"), split.count("novel")) == (48, 17)
    for image_id in data.coco.imgs:
        with Image.open(data.picture(image_id)) as picture:
            assert picture.size == (data.coco.imgs[image_id]["width"], data.coco.imgs[image_id]["height"])


def test_every_class_of_coco_has_a_name_in_lvis():
    lvis, coco = set(Vocabulary("lvis").prompts), Vocabulary("coco").prompts
    assert all(COCO_IN_LVIS.get(word, word) in lvis for word in coco)
    assert set(COCO_IN_LVIS) <= set(coco) and not set(COCO_IN_LVIS) & lvis


def test_lvis_classes_annotated_in_an_image(tmp_path):
    categories = [{"id": i, "name": name, "frequency": f} for i, name, f in ((7, "floor_mat", "f"), (8, "cup", "r"))]
    image = {"id": 1, "width": 20, "height": 20, "coco_url": "http://images.cocodataset.org/val2017/a.png"}
    image |= {"neg_category_ids": [8], "not_exhaustive_category_ids": [7]}
    data = open_set(write(tmp_path, categories=[*categories, {"id": 9, "name": "x", "frequency": "c"}], images=[image]))
    assert data.lvis and data.words[7] == "floor mat" and data.split == {7: "base", 8: "novel", 9: "base"}
    assert data.absent(1) == [8]
    truth = data.truth([1])
    assert truth.searched == {1: {7, 8}} and truth.lenient == {1: {7}}
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "val2017" / "a.png")
    assert data.picture(1) == tmp_path / "val2017" / "a.png"


def test_a_split_of_the_json_comes_first(coco):
    data = EvalSet(coco[0], Path())
    assert list(data.split.values()) == ["base", "novel", "base"]
    assert np.array_equal(data.objects(2)[1].sum((1, 2)), [375, 375])
