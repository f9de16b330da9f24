"""Files with values of wrong types, nesting and size: one sentence with the place."""

import copy
import json
import random
from pathlib import Path

import pytest

import ovsam
from ovsam.data.coco import Coco
from ovsam.data.folders import Folders
from ovsam.data.sa1b import Sa1b
from ovsam.errors import InputError
from ovsam.evaluation.datasets import open_set
from ovsam.evaluation.videos import open_videos
from ovsam.ops.files import check_target
from ovsam.ops.schema import read_json
from ovsam.processing.images import open_image
from ovsam.processing.vocabulary import Vocabulary
from ovsam.results.formats import FORMATS, read_labels
from ovsam.results.formats.coco import LabelFile, read_coco
from ovsam.training.recipe import read_recipe

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


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: Coco(folder / "a.json", folder),
        lambda folder: Coco(folder / "a.json", folder / "none"),
        lambda folder: Folders(folder),
        lambda folder: Sa1b(folder),
        lambda folder: open_set(folder),
        lambda folder: open_set(folder / "a.json"),
        lambda folder: open_videos(folder),
        lambda folder: read_labels(folder),
        lambda folder: read_labels(folder / "a.json", "coco"),
        lambda folder: read_recipe(folder / "a.json"),
        lambda folder: Vocabulary(folder / "none.txt"),
        lambda folder: open_image(folder / "a.json"),
        lambda folder: ovsam.load(folder),
        lambda folder: check_target(folder / "a.json" / "b"),
    ],
)
def test_a_line_break_in_the_name_of_a_folder_makes_no_second_line(tmp_path, monkeypatch, read):
    monkeypatch.chdir(tmp_path)  # messages shorten long paths
    folder = Path("my\nfolder")
    folder.mkdir()
    write(folder, {"images": [{"id": 1, "file_name": "a\nb.png"}], "categories": [], "annotations": []})
    with pytest.raises(InputError) as caught:
        read(folder)
    assert "my folder" in str(caught.value) or "my\\nfolder" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\udcff", "a.json/b"], ids=["long", "null", "bytes", "in a file"])
@pytest.mark.parametrize(
    "read",
    [
        lambda name: Coco(name, "."),
        lambda name: Coco("a.json", name),
        lambda name: Folders(name),
        lambda name: Sa1b(name),
        lambda name: open_set(name),
        lambda name: open_set("a.json", name),
        lambda name: open_videos(Path(name)),
        lambda name: read_recipe(Path(name)),
        lambda name: read_labels(name),
        lambda name: Vocabulary(f"{name}.txt"),
        lambda name: open_image(name),
        lambda name: ovsam.load(name),
        *(lambda name, kind=kind: read_labels(name, kind) for kind in FORMATS),
    ],
)
def test_a_name_that_no_file_can_have_is_refused(tmp_path, monkeypatch, read, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"images": [], "categories": [], "annotations": []})
    with pytest.raises(InputError):
        read(name)
