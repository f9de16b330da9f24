"""The COCO reader and images that are annotated for some words only, in the form of LVIS."""

import json

import numpy as np
import pytest
from PIL import Image

from ovsam.data import open_data
from ovsam.errors import InputError

CATEGORIES = [{"id": 7, "name": "cup"}, {"id": 3, "name": "pen"}, {"id": 5, "name": "ant"}, {"id": 9, "name": "owl"}]


def write_set(folder, *partial, categories=CATEGORIES):
    """A cup in each image; `partial` has the further fields of each image."""
    images, annotations = [], []
    for number, more in enumerate(partial, 1):
        Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 48, "height": 32} | more)
        outline = [[8, 8, 30, 8, 30, 24, 8, 24]]
        annotations.append({"id": number, "image_id": number, "category_id": 7, "segmentation": outline})
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(content))
    return {"format": "coco", "annotations": folder / "coco.json", "size": 32}


def known(data, index):
    return {word.name for word, is_known in zip(data.words, data[index]["known"].tolist(), strict=True) if is_known}


def test_images_of_both_kinds_in_one_json(tmp_path):
    data = open_data(
        write_set(
            tmp_path,
            {},
            {"neg_category_ids": [3, 5], "not_exhaustive_category_ids": []},
            {"neg_category_ids": [3], "not_exhaustive_category_ids": [7]},
            {"neg_category_ids": []},
        )
    )
    assert known(data, 0) == {"cup", "pen", "ant", "owl"}
    assert known(data, 1) == {"cup", "pen", "ant"}
    assert known(data, 2) == {"pen"}
    assert known(data, 3) == {"cup"}


def test_categories_with_frequencies_and_images_with_file_names(tmp_path):
    categories = [category | {"frequency": "f", "synonyms": []} for category in CATEGORIES]
    config = write_set(tmp_path, {"neg_category_ids": [9], "not_exhaustive_category_ids": []}, categories=categories)
    assert known(open_data(config), 0) == {"cup", "owl"}
    assert known(open_data(config | {"format": "lvis"}), 0) == {"cup", "owl"}


def test_a_crowd_is_unknown_in_a_partial_image(tmp_path):
    config = write_set(tmp_path, {"neg_category_ids": [3], "not_exhaustive_category_ids": []})
    content = json.loads(config["annotations"].read_text())
    crowd = {"id": 2, "image_id": 1, "category_id": 7, "iscrowd": 1}
    content["annotations"].append(crowd | {"segmentation": {"size": [32, 48], "counts": [100, 9, 1427]}})
    config["annotations"].write_text(json.dumps(content))
    assert known(open_data(config), 0) == {"pen"}


@pytest.mark.parametrize("table", ["neg_category_ids", "not_exhaustive_category_ids"])
def test_an_unknown_category_is_an_error(tmp_path, table):
    config = write_set(tmp_path, {"neg_category_ids": [3], "not_exhaustive_category_ids": []} | {table: [12]})
    with pytest.raises(InputError, match="has the category 12"):
        open_data(config)
