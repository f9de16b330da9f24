"""Files of other people: annotations of every format, recipes, vocabularies, model folders."""

import copy
import functools
import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from common import ROOT
from fuzz.harness import counted, examples, look_at
from fuzz.mutations import mutate, mutations, values
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovsam.data import open_data
from ovsam.evaluation.datasets import open_set
from ovsam.evaluation.videos import open_videos
from ovsam.ops import outlines
from ovsam.processing.vocabulary import Vocabulary
from ovsam.results import formats
from ovsam.results.results import Results
from ovsam.training.recipe import read_recipe

pytestmark = pytest.mark.slow
SQUARE = [[1, 1, 9, 1, 9, 9, 1, 9]]
COCO = {
    "images": [{"id": i, "file_name": f"{i}.png", "width": 48, "height": 32} for i in (1, 2)],
    "categories": [{"id": 7, "name": "cup"}, {"id": 3, "name": "pen"}],
    "annotations": [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 7,
            "segmentation": SQUARE,
            "iscrowd": 0,
            "score": 0.5,
            "bbox": [1, 1, 8, 8],
        },
        {"id": 2, "image_id": 2, "category_id": 3, "segmentation": {"size": [32, 48], "counts": [100, 20, 1416]}},
    ],
}
LVIS = COCO | {
    "images": [one | {"neg_category_ids": [3], "not_exhaustive_category_ids": []} for one in COCO["images"]],
    "categories": [one | {"frequency": "r", "synonyms": ["mug"]} for one in COCO["categories"]],
}
SA1B = {
    "image": {"width": 48, "height": 32},
    "annotations": [
        {"segmentation": {"size": [32, 48], "counts": "d0"}},
        {"segmentation": {"size": [32, 48], "counts": [1536]}},
    ],
}
VIDEO = {
    "videos": [{"id": 1, "width": 48, "height": 32, "file_names": ["a.jpg", "b.jpg"]}],
    "categories": [{"id": 7, "name": "cup"}],
    "annotations": [
        {
            "id": 1,
            "video_id": 1,
            "category_id": 7,
            "segmentations": [None, {"size": [32, 48], "counts": [100, 20, 1416]}],
        }
    ],
}
SIZES = {"height": 32, "width": 48}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("fuzz")
    for name in ("1", "2", "a"):
        Image.new("RGB", (48, 32)).save(place / f"{name}.png")
    Image.new("RGB", (48, 32)).save(place / "sa_1.jpg")
    return place


@functools.cache
def made(kind, folder):
    """Labels as this library writes them: the file or folder, the file in it that is changed, and its content."""
    mask = np.zeros((1, 32, 48), bool)
    mask[0, 4:20, 6:30] = True
    results = Results.from_arrays(mask, ["cup"], [0], [0.5], [0.6], ["cup"], "text", file_name="a.png")
    target = folder / f"{kind}{formats.FORMATS[kind]}"
    formats.write_labels([results], target, kind, labels=["cup"])
    (valid,) = formats.read_labels(target, kind, folder)
    assert [one.label for one in valid] == ["cup"]
    changed = next(target.rglob("a.*json")) if target.is_dir() and kind != "yolo" else target
    return target, changed, json.loads(changed.read_bytes()) if "json" in changed.suffix else None


@functools.cache
def parsed(path: Path) -> ElementTree.ElementTree:
    return ElementTree.parse(path)


def dump(path: Path, content) -> Path:
    path.write_bytes(json.dumps(content, ensure_ascii=True).encode())
    return path


def read(kind, path, images=None):
    with counted(kind):
        for one in formats.read_labels(path, kind, images):
            look_at(one)
            len([instance.mask for instance in Results([*one], one.size)])


@given(mutations)
@examples(2500)
def test_coco_labels(folder, changes):
    read("coco", dump(folder / "labels.json", mutate(COCO, changes)), folder)


@given(mutations)
@examples(500)
def test_coco_in_memory(folder, changes):
    with counted("coco"):
        Results.from_coco(mutate(COCO, changes))


@given(mutations, st.sampled_from(["coco", "lvis"]))
@examples(1500)
def test_coco_and_lvis_of_training(folder, changes, kind):
    path = dump(folder / "train.json", mutate(COCO if kind == "coco" else LVIS, changes))
    with counted(f"training {kind}"):
        data = open_data({"format": kind, "annotations": path, "images": folder, "size": 16, "check": False})
        len(data)


@given(mutations)
@examples(1000)
def test_sa1b(folder, changes):
    place = folder / "sa1b"
    place.mkdir(exist_ok=True)
    dump(place / "sa_1.json", mutate(SA1B, changes))
    with counted("SA-1B"):
        data = open_data({"format": "sa1b", "folder": place, "check": False, "size": 16})
        data.record(0)


@given(mutations, st.booleans())
@examples(1200)
def test_data_sets_of_evaluation(folder, changes, lvis):
    path = dump(folder / "eval.json", mutate(LVIS if lvis else COCO, changes))
    with counted("evaluation"):
        data = open_set(path)
        for image_id in data.coco.imgs:
            data.absent(image_id), data.objects(image_id), data.truth([image_id])


@given(mutations)
@examples(1000)
def test_videos(folder, changes):
    with counted("YouTube-VIS"):
        for video in open_videos(dump(folder / "video.json", mutate(VIDEO, changes))):
            [video.truth(i) for i in range(len(video.images))]


@given(mutations, st.sampled_from(["labelme", "label-studio", "geojson", "masks"]))
@examples(2500)
def test_label_files(folder, changes, kind):
    target, changed, content = made(kind, folder)
    dump(changed, mutate(content, changes))
    read(kind, target)


@given(mutations, values)
@examples(1000)
def test_cvat(folder, changes, value):
    target, _, _ = made("cvat", folder)
    tree = copy.deepcopy(parsed(target))
    elements = [one for one in tree.iter() if one.attrib]
    for number, action, new in changes:
        element = elements[number % len(elements)]
        key = sorted(element.attrib)[number % len(element.attrib)] if element.attrib else "label"
        element.attrib.pop(key, None)
        if action != "drop":
            element.set(key, "".join(c for c in str(new) if c.isprintable())[:50].encode("utf-8", "replace").decode())
    tree.write(target)
    read("cvat", target)


PIECES = [*"0 1 9 -1 0.5 nan 1e9 x é names: - { } [ ] ' \" :".split(" "), "\n", " "]


@given(st.lists(st.sampled_from(PIECES), max_size=12), st.booleans())
@examples(1000)
def test_yolo(folder, pieces, in_names):
    place, _, _ = made("yolo", folder)
    names, lines = place / "data.yaml", place / "labels" / "a.txt"
    names.write_text("names: " + " ".join(pieces) if in_names else "names: [cup]")
    lines.write_text("0 0 0 1 0 1 1" if in_names else "0 " + " ".join(pieces))
    read("yolo", place, folder)


@given(st.binary(max_size=60), st.sampled_from(["a.json", "a.geojson", "a.xml", "a.png", "a.txt"]))
@examples(1000)
def test_bytes(folder, content, name):
    path = folder / name
    path.write_bytes(content)
    with counted("bytes"):
        formats.read_labels(path)


@given(values, st.integers(1, 60), st.integers(1, 60))
@examples(1500)
def test_outlines(segmentation, height, width):
    with counted("outlines"):
        outlines.to_rle(segmentation, height, width)


RECIPE = ROOT / "adapters" / "concepts-tiny" / "recipe.toml"
KEYS = "seed stage data data.format data.size optim optim.steps optim.learning_rate optim.bf16 optim.workers"
KEYS += " eval eval.every eval.data stage_args stage_args.width stage_args.word_weight model weights rehearsal"


@given(st.lists(st.tuples(st.sampled_from(KEYS.split()), values), min_size=1, max_size=3))
@examples(1500)
def test_recipes(changes):
    settings = [f"{key}={json.dumps(value)}" for key, value in changes if "\n" not in str(value)]
    with counted("recipe"):
        read_recipe(RECIPE, settings=settings)


@given(st.text(alphabet='[]={}"\n.,abc0', max_size=40))
@examples(500)
def test_recipe_files(folder, text):
    (folder / "recipe.toml").write_text(text)
    with counted("recipe"):
        read_recipe(folder / "recipe.toml")


READER_KEYS = [
    "annotations",
    "images",
    "size",
    "novel",
    "crop",
    "flip",
    "draws",
    "paste",
    "check",
    "format",
    "keep_empty",
    "names",
]


@given(
    st.dictionaries(st.sampled_from(READER_KEYS), values, max_size=3),
    st.sampled_from(["coco", "folders", "sa1b", "mixture"]),
)
@examples(800)
def test_tables_of_readers(folder, changes, kind):
    valid = {"format": kind, "annotations": dump(folder / "train.json", COCO), "images": folder, "check": False}
    valid = valid if kind == "coco" else {"format": kind, "sets": [valid]} if kind == "mixture" else valid
    changes = {key: value for key, value in changes.items() if not (key == "size" and isinstance(value, int))}
    with counted("reader"):
        open_data(valid | changes)


@given(values | st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3))
@examples(1500)
def test_vocabularies(words):
    with counted("vocabulary"):
        assert Vocabulary(words).labels


@given(
    st.binary(max_size=40) | mutations.map(lambda m: json.dumps(mutate({"dog": "dog", "a": ["b"]}, m)).encode()),
    st.sampled_from(["txt", "json", "csv"]),
)
@examples(700)
def test_vocabulary_files(folder, content, ending):
    path = folder / f"words.{ending}"
    path.write_bytes(content)
    with counted("vocabulary"):
        assert Vocabulary(path).labels


@pytest.fixture(scope="module")
def model_folder(tiny_folder, tmp_path_factory):
    return shutil.copytree(tiny_folder, tmp_path_factory.mktemp("models") / "m")


@given(mutations, st.sampled_from(["config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"]))
@examples(100)
def test_model_folders(model_folder, tiny_folder, changes, name):
    import ovsam

    content = json.loads((tiny_folder / name).read_bytes()) if (tiny_folder / name).is_file() else {}
    dump(model_folder / name, mutate(content, changes))
    try:
        with counted("model folder"):
            segmenter = ovsam.load(model_folder, device="cpu")
            look_at(segmenter.where(Image.new("RGB", (64, 64), "gray"), ["cat"]))
    finally:
        if (tiny_folder / name).is_file():
            shutil.copy(tiny_folder / name, model_folder / name)
        else:
            (model_folder / name).unlink()
