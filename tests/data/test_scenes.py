"""EmojiScenes: the same index gives the same image, and held-out words are never drawn."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from ovsam.data import SceneDataset
from ovsam.data.scenes.drawing import SceneConfig, draw_scene, sprites
from ovsam.data.scenes.freeze import SEED, WORDS, required_words
from ovsam.data.scenes.styles import drawable
from ovsam.data.scenes.words import all_words, synonyms
from ovsam.data.words import Word, related
from ovsam.ops.masks import deepest_point

VAL = Path(__file__).parents[1] / "data" / "emojiscenes-val"
OPENMOJI = VAL.with_name("openmoji-val")


@pytest.fixture(scope="module")
def val():
    return json.loads((VAL / "annotations.json").read_text())


@pytest.fixture(scope="module")
def openmoji():
    return json.loads((OPENMOJI / "annotations.json").read_text())


def test_scene_is_a_function_of_seed_and_index():
    config = SceneConfig(canvas=160, max_size=80)
    ids = np.arange(50)
    one, again, other = draw_scene(3, 7, ids, config), draw_scene(3, 7, ids, config), draw_scene(3, 8, ids, config)
    assert one.word_ids == again.word_ids and np.array_equal(one.index_map, again.index_map)
    assert np.array_equal(np.asarray(one.image), np.asarray(again.image))
    assert not np.array_equal(np.asarray(one.image), np.asarray(other.image))


def test_every_object_keeps_its_visible_share():
    config = SceneConfig(canvas=256, min_objects=10, max_objects=14, max_size=120)
    scene = draw_scene(5, 1, np.arange(len(all_words())), config)
    areas = np.bincount(scene.index_map.ravel(), minlength=len(scene.word_ids) + 1)[1:]
    assert len(scene.word_ids) >= 5 and (areas > 64).all()
    # The colours of an object are inside its mask, where they vary more than the background.
    assert scene.index_map.max() == len(scene.word_ids)


def test_words_are_unique_drawable_and_split():
    words = all_words()
    assert len(words) == 1407 == len({w.name for w in words}) == len(sprites())
    assert all(len(w.char) == 1 for w in words[:WORDS]) and all(len(w.char) > 1 for w in words[WORDS:])
    assert set(range(WORDS)) <= set(drawable(["noto"]))
    assert sum(w.split == "novel" for w in words) == 120


def test_no_training_text_contains_a_synonym():
    targets = {w.name for w in all_words() if w.split == "base"}
    texts = [text for w in all_words() for text in (w.name, *w.keywords)]
    tokens = {token for text in texts for token in re.findall(r"[a-z]+", text.lower())}
    assert len(synonyms()) == 30
    for synonym, target in synonyms().items():
        assert synonym not in tokens and target in targets


def test_training_never_draws_a_novel_word():
    data = SceneDataset(40, seed=1, config=SceneConfig(canvas=128, min_objects=6, max_objects=9, max_size=60))
    words = all_words()
    drawn = {int(i) for item in (data[k] for k in range(40)) for i in item["word_ids"] if i >= 0}
    assert len(drawn) > 100 and all(words[i].split == "base" for i in drawn)


def test_novel_words_are_drawn_only_for_calibration():
    data = SceneDataset(3, seed=1, config=SceneConfig(canvas=192, max_size=60))
    before = data[0]["image"]
    data.novel = 2
    for sample in (data[k] for k in range(3)):
        ids = sample["word_ids"][sample["word_ids"] >= 0].tolist()
        assert len({i for i in ids if data.words[i].split == "novel"}) == 2 < len(set(ids))
    data.novel = 0
    assert data[0]["image"].equal(before)


@pytest.mark.parametrize("holes", [0.0, 0.03, 0.4])
def test_deepest_point_is_the_farthest_from_outside(holes):
    rng = np.random.default_rng(0)
    mask = np.zeros((30, 40), bool)
    mask[4:25, 6:33] = rng.random((21, 27)) >= holes
    outside = np.argwhere(~np.pad(mask, 1)) - 1
    inside = np.argwhere(mask)
    distance = np.sqrt(((inside[:, None] - outside[None]) ** 2).sum(-1)).min(1)
    x, y = deepest_point(mask)
    assert mask[y, x]
    assert distance[(inside == (y, x)).all(1)][0] == distance.max()


def test_related_words_are_not_absent_words():
    dog, face = Word("a", "dog", ("pet",), "base"), Word("b", "dog face", ("puppies",), "base")
    assert related(dog, face) and not related(dog, Word("c", "bus", ("vehicle",), "base"))


def test_the_frozen_set_has_its_documented_counts(val):
    split = {c["id"]: c["split"] for c in val["categories"]}
    names = {c["id"]: c["name"] for c in val["categories"]}
    assert len(val["images"]) == 60
    assert {i for i, s in split.items() if s == "novel"} <= {a["category_id"] for a in val["annotations"]}
    assert val["synonyms"] == synonyms()
    for image in val["images"]:
        present = {names[a["category_id"]] for a in val["annotations"] if a["image_id"] == image["id"]}
        assert len(set(image["absent_words"])) == 20 and not present & set(image["absent_words"])


def test_freeze_draws_the_frozen_set(val):
    words, drawn = all_words()[:WORDS], set(range(WORDS))
    required = required_words(np.random.default_rng(SEED), words, drawn, 100)
    for number, ids in enumerate(required[:60], 1):  # the first 60 are kept
        assert set(ids) <= {a["category_id"] - 1 for a in val["annotations"] if a["image_id"] == number}
    base = np.array([i for i, word in enumerate(words) if word.split == "base"])
    scene = draw_scene(SEED, 0, base, SceneConfig(), required[0])
    areas = [a["area"] for a in val["annotations"] if a["image_id"] == 1]
    here = np.bincount(scene.index_map.ravel(), minlength=len(scene.word_ids) + 1)[1:]
    assert here[here >= 64] == pytest.approx(areas, abs=3)  # machines resample a pixel or so differently


def test_the_openmoji_set_has_its_documented_counts(val, openmoji):
    assert openmoji["info"]["style"] == "openmoji" and openmoji["info"]["seed"] != val["info"]["seed"]
    assert openmoji["categories"] == val["categories"] and len(openmoji["images"]) == 24
    names = {c["id"]: c["name"] for c in openmoji["categories"]}
    novel = {c["id"] for c in openmoji["categories"] if c["split"] == "novel"}
    for image in openmoji["images"]:
        present = {a["category_id"] for a in openmoji["annotations"] if a["image_id"] == image["id"]}
        assert len(present & novel) >= 2
        assert len(set(image["absent_words"])) == 20 and not {names[i] for i in present} & set(image["absent_words"])
    size = sum(file.stat().st_size for file in OPENMOJI.rglob("*") if file.is_file())
    assert size < 3e6 and "CC BY-SA 4.0" in (OPENMOJI / "README.md").read_text()


@pytest.mark.parametrize("folder", [VAL, OPENMOJI])
def test_frozen_masks_fit_their_images(folder):
    content = json.loads((folder / "annotations.json").read_text())
    for image in content["images"][:10]:
        with Image.open(folder / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) == (512, 512)
        total = np.zeros((512, 512), int)
        for annotation in (a for a in content["annotations"] if a["image_id"] == image["id"]):
            mask = rle.decode(annotation["segmentation"]).astype(bool)
            x, y = annotation["point"]
            assert mask.sum() == annotation["area"] and mask[y, x]
            total += mask
        assert total.max() == 1  # visible parts never overlap
