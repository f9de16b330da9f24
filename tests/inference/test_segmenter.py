"""The three questions as a person asks them, of the embedded checkpoint, about a held-out scene."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ovsam
from ovsam import InputError

SCENE = "tests/data/emojiscenes-val/images/028.jpg"


@pytest.fixture(scope="module")
def segmenter():
    return ovsam.load("ovsam-tiny")


@pytest.fixture(scope="module")
def scene(segmenter):
    return segmenter.encode(SCENE)


def overlap(one, other) -> float:
    return float((one & other).sum() / (one | other).sum())


def test_phrases_stand_for_labels_and_each_instance_keeps_its_own(segmenter, scene):
    words = {"automobile": "vehicle", "car": "vehicle", "saxophone": "instrument"}
    found = segmenter.where(scene, words)
    assert {"vehicle", "instrument"} == set(found.labels)
    for one in found:
        assert words[one.prompt] == one.label and one.topk[0][0] == one.label
    both = {word: segmenter.where(scene, [word]) for word in ("automobile", "car")}
    best = max(one.score for results in both.values() for one in results)
    assert next(one for one in found if one.label == "vehicle").score == pytest.approx(best, abs=1e-4)


def test_what_looks_more_like_a_negative_word_is_dropped_and_named(segmenter, scene):
    plain = segmenter.where(scene, ["dog"])
    told = segmenter.where(scene, ["dog"], negative=["dog face"])
    assert len(plain) == 1 and len(told) == 0 and not plain.dropped
    (dropped,) = told.dropped
    assert dropped["text_label"] == "dog" and dropped["negative"] == "dog face"
    assert dropped["negative_score"] > dropped["score"] == pytest.approx(plain[0].score)


def test_presence_says_how_sure_each_word_is(segmenter, scene):
    found = segmenter.where(scene, ["car", "saxophone"], threshold=0.99)
    assert len(found) == 0 and 0.8 < found.presence["car"] < 0.99 and found.presence["saxophone"] < 0.6


def test_an_exemplar_finds_its_kind_alone_and_beside_words(segmenter, scene):
    car = segmenter.where(scene, ["car"])[0]
    alone = segmenter.where(scene, exemplars=[car.box])
    assert alone[0].label == "exemplar" and overlap(alone[0].mask, car.mask) > 0.8
    elsewhere = segmenter.where(SCENE, exemplars=[(scene, car.box)])
    assert [one.segmentation for one in elsewhere] == [one.segmentation for one in alone]
    as_array = segmenter.where(scene, exemplars=[np.array(car.box, dtype=np.int64)])
    assert [one.segmentation for one in as_array] == [one.segmentation for one in alone]
    both = segmenter.where(scene, ["dog face"], exemplars={"mine": [car.box]})
    assert {"dog face", "mine"} <= set(both.labels)
    with pytest.raises(InputError, match="words, or exemplars"):
        segmenter.where(scene)


def test_a_mask_is_a_prompt(segmenter, scene):
    """A rough mask gives the exact one, and the same name as its box."""
    car = segmenter.where(scene, ["car"])[0]
    rough = torch.from_numpy(car.mask).float()[None, None]
    rough = torch.nn.functional.max_pool2d(rough, 9, 1, 4)[0] > 0  # four pixels too large all around
    found = segmenter.what(scene, masks=rough, vocabulary=["car", "dog face", "saxophone"])
    assert found[0].source == "mask" and found[0].label == "car"
    assert overlap(found[0].mask, car.mask) > overlap(rough[0].numpy(), car.mask)
    with pytest.raises(InputError, match="2 boxes for 1 masks"):
        segmenter.what(scene, boxes=[car.box, car.box], masks=rough)


def test_prompts_may_be_arrays(segmenter, scene):
    box = [145, 37, 215, 89]
    plain = segmenter.what(scene, boxes=[box], vocabulary=["car", "dog face"])
    for boxes in (np.array([box], dtype=np.int64), torch.tensor([box])):
        assert segmenter.what(scene, boxes=boxes, vocabulary=["car", "dog face"])[0] == plain[0]
    clicked = segmenter.what(scene, points=np.array([[180, 60]]), vocabulary=["car", "dog face"])
    assert clicked[0].label == "car"


def test_edges_run_along_the_things(segmenter, scene):
    edges = segmenter.edges(scene)
    assert edges.shape == (512, 512) and edges.max() <= 1
    car = torch.from_numpy(segmenter.where(scene, ["car"])[0].mask).float()[None, None]
    rim = torch.nn.functional.max_pool2d(car, 9, 1, 4) + torch.nn.functional.max_pool2d(-car, 9, 1, 4) > 0
    # Far more than anywhere, up to the strongest; edges of its parts lie inside.
    assert edges[rim[0, 0]].mean() > 4 * edges.mean() and edges[rim[0, 0]].max() > 0.9
    corner = edges[440:, :120]  # nothing lies there
    assert corner.max() < 0.01


def test_exclusive_masks_share_no_pixel(segmenter, scene):
    shared = segmenter.everything(scene, objectness=0.1, nms=None)
    apart = segmenter.everything(scene, objectness=0.1, nms=None, exclusive=True)
    assert shared.masks.sum(0).max() > 1 == apart.masks.sum(0).max()
    assert np.array_equal(apart.masks.any(0), shared.masks.any(0))


def test_unrefined_masks_cost_no_decoding(segmenter, scene, monkeypatch):
    refined = segmenter.where(scene, ["car"])[0]
    monkeypatch.setattr(segmenter.model.sam, "decode", None)
    rough = segmenter.where(scene, ["car"], refine=False)[0]
    assert 0.7 < overlap(rough.mask, refined.mask) < 1


def test_a_thing_across_the_seams_of_tiles_is_found_once(segmenter, scene):
    expected = segmenter.where(scene, ["car"])[0]
    large = Image.new("RGB", (1024, 640), "gray")
    x, y = 380, 90  # the car lies across columns 525 to 595: seams are at 512 and 640
    large.paste(Image.open(SCENE), (x, y))
    found = segmenter.where(large, ["car"], tile=512)
    there = np.zeros((640, 1024), dtype=bool)
    there[y : y + 512, x : x + 512] = expected.mask
    assert sum(overlap(one.mask, there) > 0.5 for one in found) == 1
    with pytest.raises(InputError, match="pass the image itself"):
        segmenter.where(scene, ["car"], tile=512)


def test_filtering_again_runs_no_model(segmenter, scene, monkeypatch):
    found = segmenter.everything(scene, objectness=0.2)
    monkeypatch.setattr(segmenter, "model", None)
    fewer = found.filter(score=0.45, min_area=1000)
    assert 0 < len(fewer) < len(found)
    assert all(one.score >= 0.45 and one.area >= 1000 for one in fewer)


def same(one, other):
    assert one.labels == other.labels and len(one) > 0
    assert [each.segmentation for each in one] == [each.segmentation for each in other]


def test_encode_returns_the_image_and_its_features(segmenter, scene):
    assert isinstance(scene, ovsam.EncodedImage) and scene.image.size == (512, 512)
    assert segmenter.encode(scene) is scene
    same(segmenter.where(scene, ["car"]), segmenter.where(SCENE, ["car"]))


def test_images_of_every_kind(segmenter, scene):
    expected = segmenter.where(scene, ["car"])
    array = np.asarray(scene.image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for image in (scene.image, array, tensor, tensor / 255, Path(SCENE), Path(SCENE).read_bytes()):
        same(segmenter.where(image, ["car"]), expected)


def test_a_list_of_images_gives_a_list_of_results(segmenter, scene, monkeypatch):
    other, words = SCENE.replace("028", "029"), ["car", "dog face", "pizza"]
    singles = [segmenter.everything(image, words) for image in (scene, other, SCENE)]
    calls, own = [], segmenter.model.encode
    monkeypatch.setattr(segmenter.model, "encode", lambda *pixels: (calls.append(len(pixels)), own(*pixels))[1])
    encoded = segmenter.encode([scene, other, SCENE])
    assert len(calls) == 1 and encoded[0] is scene and encoded[1].features.sam.embedding.shape[0] == 1
    for found, single in zip(segmenter.everything(encoded, words), singles, strict=True):
        assert found.labels == single.labels and np.mean(found.masks == single.masks) > 0.999
    assert len(calls) == 1
    boxes = [[[145, 37, 215, 89]], [[20, 20, 120, 120], [60, 60, 200, 200]]]
    named = segmenter.what([scene, other], boxes=boxes, vocabulary=words)
    assert [len(each) for each in named] == [1, 2]
    same(named[0], segmenter.what(scene, boxes=boxes[0], vocabulary=words))
    same(segmenter.where([scene], exemplars=[(scene, boxes[0][0])])[0], segmenter.where(scene, exemplars=boxes[0]))
    assert segmenter.where([], ["car"]) == [] and len(segmenter.edges([scene, other])) == 2
    with pytest.raises(InputError, match="2 images and 1 boxes"):
        segmenter.what([scene, other], boxes=boxes[:1])
    with pytest.raises(InputError, match="an exemplar is \\(image, box\\)"):
        segmenter.where([scene, other], exemplars=boxes[0])


@pytest.mark.parametrize(
    "image, message",
    [
        (3, "got int"),
        (None, "got NoneType"),
        ({"image": SCENE}, "got dict"),
        ([SCENE, 3.5], "got float"),
        (b"no image", "bytes are not an image"),
        (torch.zeros(512, 512, 3), "an image is \\[3, H, W\\]"),
        (torch.zeros(3, 64, 64, dtype=torch.int64), "of torch.int64"),
        (torch.full((3, 64, 64), 255.0), "floats of an image are in \\[0, 1\\]"),
    ],
)
def test_what_is_no_image_is_one_sentence(segmenter, image, message):
    with pytest.raises(InputError, match=message) as error:
        segmenter.where(image, ["car"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tile", [None, 384])
def test_one_score_in_every_mode(segmenter, scene, tile):
    """A threshold of `everything` is that of `filter`, the class name's; objectness is an option of its own."""
    image = SCENE if tile else scene
    found = segmenter.everything(image, tile=tile)
    assert np.all(np.diff(found.scores) <= 0) and [one.id for one in found] == list(range(1, len(found) + 1))
    middle = float(np.median(found.scores))
    fewer = segmenter.everything(image, tile=tile, threshold=middle)
    assert 0 < len(fewer) < len(found) and list(fewer) == list(found.filter(score=middle))
    if not tile:
        strict = segmenter.everything(image, objectness=0.6)
        assert 0 < len(strict) < len(found) and all(one.objectness >= 0.6 for one in strict)
        assert {one.box for one in strict} <= {one.box for one in found}


@pytest.mark.parametrize("question", ["where", "everything", "what"])
def test_options_are_checked_before_the_model_runs(segmenter, monkeypatch, question):
    monkeypatch.setattr(segmenter, "model", None)
    prompt = {"where": {"words": ["car"]}, "everything": {}, "what": {"points": [[180, 60]]}}[question]
    ask = partial(getattr(segmenter, question), SCENE, **prompt)
    with pytest.raises(TypeError, match="mask_treshold"):
        ask(mask_treshold=0.5)
    with pytest.raises(InputError, match="mask_threshold is 1.5; it must be between 0 and 1"):
        ask(mask_threshold=1.5)
    with pytest.raises(InputError, match="top_k is -1"):
        ask(top_k=-1)
    if question != "what":
        with pytest.raises(InputError, match="no NMS 'fats'; nms is "):
            ask(nms="fats")
        with pytest.raises(InputError, match="threshold is 40; it must be between 0 and 1"):
            ask(threshold=40)


def test_embeddings_of_the_last_vocabularies_stay_in_memory(segmenter, monkeypatch):
    encoded, own = [], segmenter._encode_words
    monkeypatch.setattr(segmenter, "_encode_words", lambda phrases: (encoded.append(phrases), own(phrases))[1])
    segmenter._embeds.clear()
    _, embeds = segmenter.embed(["car", "dog"])
    assert segmenter.embed(["car", "dog"])[1] is embeds and len(encoded) == 1
    vocabulary, again = segmenter.embed({"car": "vehicle", "dog": "animal"})
    assert vocabulary.labels == ["vehicle", "animal"] and again is embeds and len(encoded) == 1
    for number in range(8):
        segmenter.embed([f"word {number}"])
    segmenter.embed(["car", "dog"])
    assert len(encoded) == 10 and len(segmenter._embeds) == 8
    with torch.no_grad():
        next(segmenter.model.clip.parameters()).mul_(1)
    segmenter.embed(["car", "dog"])
    assert len(encoded) == 11


def test_device_and_dtype(scene):
    half = ovsam.load("ovsam-tiny", device="cpu", dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and half.device == torch.device("cpu")
    assert repr(half).startswith("Segmenter('ovsam-tiny': composition ") and "bfloat16 on cpu" in repr(half)
    expected = half.to(dtype=torch.float32).where(scene, ["car"])
    assert half.dtype == torch.float32 and half.to("cpu") is half
    assert overlap(half.to(dtype="bfloat16").where(SCENE, ["car"])[0].mask, expected[0].mask) > 0.9
    with pytest.raises(InputError, match="dtype is 'int8'; it must be float32"):
        ovsam.load("ovsam-tiny", dtype="int8")
    with pytest.raises(InputError, match="device 'warp' cannot be used here"):
        half.to("warp")
