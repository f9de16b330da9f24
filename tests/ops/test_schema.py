"""Files with values of wrong types, nesting and size: one sentence with the place."""

import copy
import json
import random

import pytest

from ovsam.errors import InputError
from ovsam.ops.schema import read_json
from ovsam.results.formats.coco import LabelFile, read_coco

GOOD = {
    "images": [{"id": 1, "file_name": "a.png", "width": 48, "height": 32}],
    "categories": [{"id": 7, "name": "cup"}],
    "annotations": [
        {"id": i, "image_id": 1, "category_id": 7, "segmentation": [[1, 1, 9, 1, 9, 9]], "score": 0.5} for i in range(4)
    ],
}
DEEP = "[" * 5000 + "]" * 5000
WRONG = [None, True, 0, -1, 1.5, 10**30, "", "x", [], [[]], [[[1]]], {}, {"a": 1}, float("nan")]


def write(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][3].update(segmentation=5), r"annotations\[3\].segmentation of .* a whole number"),
        (lambda c: c["annotations"][2]["segmentation"][0].__setitem__(1, "x"), r"\[2\].segmentation\[0\].* a string"),
        (lambda c: c["annotations"][1].pop("image_id"), r"annotations\[1\] of .* lacks image_id"),
        (lambda c: c["annotations"][0].update(score=1.5), r"annotations\[0\].score of .* must be a number <= 1"),
        (lambda c: c["images"][0].update(width=10**30), r"images\[0\].width of .* must be a whole number <= 1000000"),
        (lambda c: c["categories"].__setitem__(0, "cup"), r"categories\[0\] of .* is a string; it must be a table"),
        (lambda c: c.pop("images"), "a.json lacks images"),
    ],
)
def test_the_place_is_named(tmp_path, change, message):
    content = copy.deepcopy(GOOD)
    change(content)
    with pytest.raises(InputError, match=message) as caught:
        read_coco(write(tmp_path, content))
    assert "\n" not in str(caught.value) and str(caught.value)[0].isupper() or "lacks" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DEEP, "a.json"),
        ('{"info": ' + DEEP + "}", "a.json"),
        ('{"images": [', "is not a JSON file"),
        ("\0", "is not a JSON file"),
        ("", "is not a JSON file"),
    ],
)
def test_what_is_no_json_or_too_deep_is_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_json(write(tmp_path, content), LabelFile)


def test_json_of_lenient_writers_is_read(tmp_path):
    text = json.dumps(GOOD | {"info": float("nan")})
    path = tmp_path / "a.json"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes(text.encode(encoding))
        assert len(read_coco(path)[0].instances) == 4


def places(content, path=()):
    yield path
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in entries:
        yield from places(value, (*path, key))


def test_any_wrong_value_at_any_place_is_one_sentence_or_read(tmp_path):
    rng = random.Random(0)
    for path in list(places(GOOD))[1:]:
        for value in rng.sample(WRONG, 8):
            content = copy.deepcopy(GOOD)
            *way, last = path
            table = content
            for key in way:
                table = table[key]
            table[last] = value
            try:
                read_coco(write(tmp_path, content))
            except InputError as error:
                assert "\n" not in str(error)


def test_pipes_and_folders_are_refused_without_waiting(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("pipe.json", "folder.json", "nothing.json", "x" * 300):
        with pytest.raises(InputError, match="There is no file at"):
            read_json(tmp_path / name)
