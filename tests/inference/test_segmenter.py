"""The Segmenter on a tiny random model: the three questions give the model's own answers in pixels of the image."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from common import SIZE, WORDS, picture, tiny_model, tiny_processor
from torch.testing import assert_close

import ovsam
from ovsam import InputError, Segmenter

BOXES = [[10, 20, 60, 80], [70, 5, 125, 50], [1, 1, 9, 9]]
WIDE = picture(1, width=200, height=90)
LOW = {"threshold": 0.0}  # scores of random models lie anywhere


@pytest.fixture(scope="module")
def segmenter():
    """Masks of a random model overlap: only equal ones are suppressed."""
    model = tiny_model(proposal_threshold=0.3, mask_nms_threshold=1.0)
    return Segmenter(model, tiny_processor(), "tiny")


@pytest.fixture(scope="module")
def scene(segmenter):
    return segmenter.encode(picture())


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    picture().save(path)
    return path


def scores(results):
    return torch.tensor([one.score for one in results])


def same(one, other):
    assert one.labels == other.labels and len(one) > 0
    assert [each.segmentation for each in one] == [each.segmentation for each in other]


@torch.no_grad()
def answer(segmenter, image, threshold=None, **asked):
    """The results of the model and the processor without the segmenter."""
    inputs = segmenter.processor(images=image, **asked)
    post_process = segmenter.processor.post_process_instance_segmentation
    return post_process(segmenter.model(**inputs), target_sizes=inputs["original_sizes"], threshold=threshold)[0]


# ---- where


def test_where_equals_the_model_and_the_processor(segmenter):
    found = segmenter.where(WIDE, ["cat", "dog"], threshold=0.5)
    expected = answer(segmenter, WIDE, text=["cat", "dog"], threshold=0.5)
    assert found.labels == expected["text_labels"] and len(found) > 3
    assert_close(scores(found), expected["scores"].float(), rtol=0, atol=1e-4)
    assert found.size == (90, 200) and found.model == "tiny"


def test_phrases_stand_for_labels_and_each_instance_keeps_its_own(segmenter, scene):
    words = {"cat": "animal", "dog": "animal", "moon": "satellite"}
    found = segmenter.where(scene, words, **LOW)
    assert set(found.labels) == {"animal", "satellite"}
    for one in found:
        assert words[one.prompt] == one.label and one.topk[0][0] == one.label
    best = max(one.score for word in ("cat", "dog") for one in segmenter.where(scene, [word], **LOW))
    assert found.presence["animal"] == pytest.approx(best, abs=1e-4)


def test_negative_queries_drop_instances_that_match_better(segmenter, scene):
    asked, negatives = ["moon", "star"], WORDS[:4]
    plain = segmenter.where(scene, asked, threshold=0.3)
    told = [segmenter.where(scene, asked, negative=[word], threshold=0.3) for word in negatives]
    assert not plain.dropped and min(map(len, told)) < len(plain)
    for word, found in zip(negatives, told, strict=True):
        expected = answer(segmenter, scene.image, text=asked, negative_text=[word], threshold=0.3)
        assert_close(scores(found), expected["scores"].float(), rtol=0, atol=1e-4)
        for dropped in found.dropped:
            assert dropped["negative"] == word and dropped["negative_score"] > dropped["score"]
    assert len(segmenter.where(scene, ["cat"], negative=["cat"], **LOW)) == 0


def test_presence_is_the_highest_score_of_each_word(segmenter, scene):
    found = segmenter.where(scene, ["cat", "moon"], threshold=1.0)
    assert len(found) == 0
    for word, score in found.presence.items():
        alone = segmenter.where(scene, [word], nms=None, **LOW)
        assert score == pytest.approx(alone.scores.max(), abs=1e-4)


def test_exemplars_with_and_without_words(segmenter, scene):
    box = BOXES[0]
    alone = segmenter.where(scene, exemplars=[box], **LOW)
    assert set(alone.labels) == {"exemplar"}
    same(segmenter.where(picture(), exemplars=[(scene, box)], **LOW), alone)
    same(segmenter.where(scene, exemplars=[np.array(box, dtype=np.int64)], **LOW), alone)
    both = segmenter.where(scene, ["cat"], exemplars={"mine": [box], "cat": [box]}, **LOW)
    assert set(both.labels) <= {"cat", "mine"} and {label for label, _ in both[0].topk} == {"cat", "mine"}
    with pytest.raises(InputError, match="pass words or exemplars"):
        segmenter.where(scene)


def test_unrefined_masks_cost_no_decoding(segmenter, scene, monkeypatch):
    refined = segmenter.where(scene, ["cat"], **LOW)
    monkeypatch.setattr(segmenter.model.sam, "decode", None)
    rough = segmenter.where(scene, ["cat"], refine=False, **LOW)
    assert len(rough) > 1 and rough[0].segmentation != refined[0].segmentation


def test_without_a_concept_head_there_are_prompts_only(segmenter):
    bare = Segmenter(tiny_model(adapters=False), segmenter.processor)
    assert len(bare.what(picture(), boxes=BOXES, vocabulary=["cat", "dog"])) == 3
    with pytest.raises(InputError, match="no ConceptHead"):
        bare.where(picture(), ["cat"], proposer="concepts")


# ---- what


def test_prompts_are_named(segmenter, scene):
    words = ["cat", "dog", "moon"]
    found = segmenter.what(scene, boxes=BOXES, vocabulary=words)
    expected = answer(segmenter, scene.image, input_boxes=[BOXES], text=words)
    assert found.labels == expected["text_labels"] and len(found) == 3
    assert_close(scores(found), expected["scores"].float(), rtol=0, atol=1e-4)
    assert [list(one.prompt) for one in found] == BOXES and {one.source for one in found} == {"box"}
    (click,) = segmenter.what(scene, points=[[20, 30], [90, 90]], labels=[1, 0], vocabulary=words)
    points = {"input_points": [[[[20, 30], [90, 90]]]], "input_labels": [[[1, 0]]]}
    expected = answer(segmenter, scene.image, text=words, **points)
    assert click.label == expected["text_labels"][0] and click.source == "point"
    assert click.score == pytest.approx(float(expected["scores"]), abs=1e-4)
    (unnamed,) = segmenter.what(scene, points=[[20, 30]])
    assert unnamed.label == "object" and unnamed.score == 1


def test_a_mask_is_a_prompt(segmenter, scene):
    masks = np.zeros((2, SIZE, SIZE), bool)
    masks[0, 20:80, 10:60] = masks[1, 5:50, 70:125] = True
    for given in (masks, torch.from_numpy(masks)):
        first, second = segmenter.what(scene, masks=given, vocabulary=["cat", "dog"])
        assert first.source == second.source == "mask" and first.segmentation != second.segmentation
    with pytest.raises(InputError, match="1 boxes for 2 masks"):
        segmenter.what(scene, boxes=BOXES[:1], masks=masks)


def test_prompts_may_be_arrays(segmenter, scene):
    plain = segmenter.what(scene, boxes=BOXES, vocabulary=["cat", "dog"])
    for boxes in (np.array(BOXES, dtype=np.int64), torch.tensor(BOXES)):
        assert list(segmenter.what(scene, boxes=boxes, vocabulary=["cat", "dog"])) == list(plain)
    clicked = segmenter.what(scene, points=np.array([[20, 30]]), vocabulary=["cat"])
    assert list(clicked) == list(segmenter.what(scene, points=[[20, 30]], vocabulary=["cat"]))


def test_the_best_of_synonyms_counts(segmenter, scene):
    separate = segmenter.what(scene, boxes=BOXES, vocabulary=["cat", "moon", "dog"])
    joined = segmenter.what(scene, boxes=BOXES, vocabulary={"cat": "animal", "dog": "animal", "moon": "moon"})
    for one, other in zip(separate, joined, strict=True):
        by_word = dict(one.topk)
        best = {"animal": max(by_word["cat"], by_word["dog"]), "moon": by_word["moon"]}
        assert dict(other.topk) == pytest.approx(best, abs=1e-3)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ({}, "pass points, boxes or masks"),
        ({"points": [[128, 5]]}, "point 128,5 is outside the .*, which is 128x128"),
        ({"points": [[-1, 5]]}, "point -1,5 is outside"),
        ({"boxes": [[50, 5, 10, 60]]}, "box 50,5,10,60 is not inside .*; it must be left,top,right,bottom"),
        ({"boxes": [[0, 0, SIZE + 1, 60]]}, "inside the "),
        ({"points": [[5, 5]], "labels": [1, 0]}, "2 labels for 1 points"),
        ({"points": [[5, 5]], "boxes": [[0, 0, 5, 5], [5, 5, 9, 9]]}, "one box"),
    ],
)
def test_invalid_prompts_raise_an_error(segmenter, prompt, message):
    with pytest.raises(InputError, match=message):
        segmenter.what(picture(), **prompt)


# ---- everything, edges


def test_everything_is_selected_by_objectness_for_any_words(segmenter, scene):
    found, other = (segmenter.everything(scene, words, objectness=0.5) for words in (["cat", "dog"], ["moon", "star"]))
    unnamed = segmenter.everything(scene, objectness=0.5)
    assert len(found) == len(other) == len(unnamed) > 3
    assert sorted(one.bbox for one in found) == sorted(one.bbox for one in unnamed)
    assert set(found.labels) <= {"cat", "dog"} and set(unnamed.labels) == {"object"}


@pytest.mark.parametrize("tile", [None, pytest.param(96, marks=pytest.mark.slow)])
def test_one_score_in_every_mode(segmenter, scene, tile):
    """A threshold of `everything` is that of `filter`, the class name's; objectness is an option of its own."""
    ask = partial(segmenter.everything, WIDE if tile else scene, ["cat", "dog", "moon"], tile=tile)
    found = ask()
    assert np.all(np.diff(found.scores) <= 0) and [one.id for one in found] == list(range(1, len(found) + 1))
    middle = float(np.median(found.scores))
    fewer = ask(threshold=middle)
    assert 0 < len(fewer) < len(found) and list(fewer) == list(found.filter(score=middle))
    if not tile:
        middle = float(np.median([one.objectness for one in found]))
        strict = ask(objectness=middle)
        assert 0 < len(strict) < len(found) and all(one.objectness >= middle for one in strict)
        assert {one.box for one in strict} <= {one.box for one in found}


def test_exclusive_masks_share_no_pixel(segmenter, scene):
    shared = segmenter.everything(scene, objectness=0.1, nms=None)
    apart = segmenter.everything(scene, objectness=0.1, nms=None, exclusive=True)
    assert shared.masks.sum(0).max() > 1 == apart.masks.sum(0).max()
    assert np.array_equal(apart.masks.any(0), shared.masks.any(0))


def test_edges_have_the_size_of_the_image(segmenter):
    edges = segmenter.edges(WIDE)
    assert edges.shape == (90, 200) and 0 <= edges.min() < edges.max() <= 1


# ---- images in, options, devices


def test_encode_returns_the_image_and_its_features(segmenter, scene, path, monkeypatch):
    assert isinstance(scene, ovsam.EncodedImage) and scene.image.size == (SIZE, SIZE)
    assert segmenter.encode(scene) is scene
    same(segmenter.where(scene, ["cat"]), segmenter.where(path, ["cat"]))
    monkeypatch.setattr(segmenter.model, "encode", None)  # no question encodes it again
    for results in (
        segmenter.where(scene, ["cat"], **LOW),
        segmenter.everything(scene, ["cat", "dog"]),
        segmenter.what(scene, boxes=BOXES, vocabulary=["cat", "dog"]),
    ):
        assert len(results)
    with pytest.raises(InputError, match="pass the image itself"):
        segmenter.where(scene, ["cat"], tile=96)


def test_images_of_every_kind(segmenter, scene, path):
    expected = segmenter.where(scene, ["cat"])
    array = np.asarray(scene.image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for image in (scene.image, array, tensor, tensor / 255, Path(path), str(path), path.read_bytes()):
        same(segmenter.where(image, ["cat"]), expected)


def test_a_list_of_images_gives_a_list_of_results(segmenter, scene, path, monkeypatch):
    words = ["cat", "dog", "moon"]
    singles = [segmenter.everything(image, words) for image in (scene, WIDE, path)]
    calls, own = [], segmenter.model.encode
    monkeypatch.setattr(
        segmenter.model, "encode", lambda *pixels, **kind: (calls.append(len(pixels)), own(*pixels, **kind))[1]
    )
    encoded = segmenter.encode([scene, WIDE, path])
    assert len(calls) == 1 and encoded[0] is scene and encoded[1].features.sam.embedding.shape[0] == 1
    for found, single in zip(segmenter.everything(encoded, words), singles, strict=True):
        assert found.labels == single.labels and np.mean(found.masks == single.masks) > 0.999
    assert len(calls) == 1
    boxes = [BOXES[:1], BOXES[1:]]
    named = segmenter.what([scene, picture(2)], boxes=boxes, vocabulary=words)
    assert [len(each) for each in named] == [1, 2]
    same(named[0], segmenter.what(scene, boxes=boxes[0], vocabulary=words))
    listed = segmenter.where([scene], exemplars=[(scene, BOXES[0])], **LOW)[0]
    same(listed, segmenter.where(scene, exemplars=boxes[0], **LOW))
    assert segmenter.where([], ["cat"]) == [] and len(segmenter.edges([scene, WIDE])) == 2
    with pytest.raises(InputError, match="a list of 2 images, boxes must be a list with one entry for each"):
        segmenter.what([scene, WIDE], boxes=boxes[:1])
    with pytest.raises(InputError, match="an exemplar must be \\(image, box\\)"):
        segmenter.where([scene, WIDE], exemplars=boxes[0])


@pytest.mark.parametrize(
    "image, message",
    [
        (3, "got int"),
        (None, "got NoneType"),
        ({"image": "scene.png"}, "got dict"),
        ([picture(), 3.5], "got float"),
        (b"no image", "is not an image in a supported format"),
        (torch.zeros(512, 512, 3), "an image must be"),
        (torch.zeros(3, 64, 64, dtype=torch.int64), "of torch.int64"),
        (torch.full((3, 64, 64), 255.0), "floats of an image must be in \\[0, 1\\]"),
    ],
)
def test_other_values_than_images_raise_an_error(segmenter, image, message):
    with pytest.raises(InputError, match=message) as error:
        segmenter.where(image, ["cat"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("question", ["where", "everything", "what"])
def test_options_are_checked_before_the_model_runs(segmenter, monkeypatch, question):
    monkeypatch.setattr(segmenter, "model", None)
    prompt = {"where": {"words": ["cat"]}, "everything": {}, "what": {"points": [[18, 60]]}}[question]
    ask = partial(getattr(segmenter, question), picture(), **prompt)
    with pytest.raises(InputError, match="no argument 'mask_treshold'; did you mean 'mask_threshold'?"):
        ask(mask_treshold=0.5)
    with pytest.raises(InputError, match="mask_threshold is 1.5; it must be between 0 and 1"):
        ask(mask_threshold=1.5)
    with pytest.raises(InputError, match="top_k is -1"):
        ask(top_k=-1)
    if question != "what":
        with pytest.raises(InputError, match="no NMS 'fats'; did you mean 'fast'"):
            ask(nms="fats")
        with pytest.raises(InputError, match="threshold is 40; it must be between 0 and 1"):
            ask(threshold=40)


def test_device_and_dtype(tiny_folder, scene):
    half = ovsam.load(tiny_folder, device="cpu", dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and half.device == torch.device("cpu")
    assert repr(half).startswith(f"Segmenter({str(tiny_folder)!r}: composition ") and "bfloat16 on cpu" in repr(half)
    assert len(half.where(picture(), ["cat"], **LOW))
    assert len(half.to(dtype=torch.float32).where(scene, ["cat"], **LOW))
    assert half.dtype == torch.float32 and half.to("cpu") is half
    with pytest.raises(InputError, match="dtype is 'int8'; it must be float32"):
        ovsam.load(tiny_folder, dtype="int8")
    with pytest.raises(InputError, match="device 'warp' cannot be used here"):
        half.to("warp")


# ---- embeddings of words


def test_embeddings_of_the_last_vocabularies_stay_in_memory(segmenter, monkeypatch):
    encoded, own = [], segmenter.encode_words
    monkeypatch.setattr(ovsam.inference.text_embedder, "KEPT_PHRASES", 9)
    monkeypatch.setattr(segmenter, "encode_words", lambda phrases: (encoded.append(phrases), own(phrases))[1])
    segmenter._texts.kept.clear()
    _, embeds = segmenter.embed(["cat", "dog"])
    assert segmenter.embed(["cat", "dog"])[1] is embeds and len(encoded) == 1
    vocabulary, again = segmenter.embed({"cat": "vehicle", "dog": "animal"})
    assert vocabulary.labels == ["vehicle", "animal"] and again is embeds and len(encoded) == 1
    for number in range(8):
        segmenter.embed([f"word {number}"])
    segmenter.embed(["cat", "dog"])
    assert len(encoded) == 10 and len(segmenter._texts.kept) == 8  # two words, and seven of one
    with torch.no_grad():
        next(segmenter.model.clip.parameters()).mul_(1)
    segmenter.embed(["cat", "dog"])
    assert len(encoded) == 11


def test_long_vocabularies_are_cached_on_disk_by_tower(tmp_path, monkeypatch):
    monkeypatch.setattr(ovsam.inference.text_embedder, "CACHE", tmp_path)
    many = [f"{one} {other} {third}" for one in WORDS for other in WORDS for third in WORDS]
    plain = Segmenter(tiny_model(), tiny_processor())
    _, embeds = plain.embed(many)
    assert len(list(tmp_path.iterdir())) == 1
    _, again = plain.embed(many)
    assert torch.equal(embeds, again)
    words = plain.model.clip.text_model.embeddings.word_embeddings.weight.data
    words.add_(torch.randn_like(words))
    _, changed = Segmenter(plain.model, plain.processor).embed(many)
    assert len(list(tmp_path.iterdir())) == 2 and (changed - embeds).abs().max() > 0.01
