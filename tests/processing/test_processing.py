"""The processor: images, words and prompts to tensors, outputs to named masks."""

import functools
import math

import numpy as np
import pytest
import torch
from common import picture, tiny_model, tiny_processor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoProcessor, CLIPImageProcessor
from transformers.models.mask2former.image_processing_mask2former import compute_segments

import ovsam
from ovsam import InputError, OVSamOutput
from ovsam.modeling.scoring import word_mask
from ovsam.ops import rle

BOXES = [[[10, 20, 60, 80], [70, 5, 125, 50], [1, 1, 9, 9]], [[30, 30, 100, 80]]]


@functools.cache
def model():
    return tiny_model(proposal_threshold=0.3, mask_nms_threshold=1.0)  # random masks overlap


@functools.cache
def processor():
    return tiny_processor()


def pictures():
    return [picture(0), picture(1, width=200, height=90)]


@torch.no_grad()
def answer(inputs, **options):
    outputs = model()(**inputs)
    post_process = processor().post_process_instance_segmentation
    return post_process(outputs, target_sizes=inputs["original_sizes"], **options)


# ------------------------------------------------------------------------------------------------ words in


def test_words_are_tokenised_and_ride_along():
    inputs = processor()(images=picture(), text=["cat", "red ball"], negative_text="moon")
    vocabulary = processor().tokenizer.get_vocab()
    cat, red, ball, moon = (vocabulary[word] for word in ("cat", "red", "ball", "moon"))
    assert inputs["input_ids"].tolist() == [[62, cat, 63, 0], [62, red, ball, 63], [62, moon, 63, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert inputs["text_labels"] == ["cat", "red ball"] and inputs["negative_labels"] == ["moon"]
    padded = tiny_processor(text_padding="max_length").tokenize(["cat"])
    assert padded["input_ids"].tolist() == [[62, cat, 63] + 9 * [0]]


def test_lists_per_image_share_their_words():
    inputs = processor()(images=pictures(), text=[["cat", "dog"], ["moon", "cat"]])
    assert len(inputs["input_ids"]) == 3 and inputs["text_labels"] == [["cat", "dog"], ["moon", "cat"]]
    assert word_mask(inputs["text_labels"]).tolist() == [[True, True, False], [True, False, True]]


@pytest.mark.parametrize(
    "text, said",
    [
        ([], "list of text queries is empty"),
        ([[], []], "list of text queries is empty"),
        ("", "'' is not valid"),
        (["", "  "], "'' is not valid"),
        (["cat", 3], "3 is not valid"),
        (["red ball " * 6], "14 tokens; this model takes at most 12"),
        ([["cat"]], "one list for each image"),
        ([["cat"], "dog"], "one list for each image"),
    ],
)
def test_invalid_words_raise_an_error(text, said):
    with pytest.raises(InputError, match=said):
        processor()(images=pictures(), text=text)


# ------------------------------------------------------------------------------------------------ prompts in


def test_coordinates_are_resized_with_the_image():
    inputs = processor()(images=pictures()[1], input_boxes=[[[50, 45, 100, 90]]], input_points=[[[[200, 9]]]])
    assert_close(inputs["input_boxes"], torch.tensor([[[32.0, 64, 64, 128]]]))
    assert_close(inputs["input_points"], torch.tensor([[[[128.0, 12.8]]]]))
    assert inputs["original_sizes"].tolist() == [[90, 200]]


@pytest.mark.parametrize("kind", ["boxes", "points"])
def test_images_with_fewer_prompts_are_padded_and_equal_separate_calls(kind):
    if kind == "boxes":
        prompts = [{"input_boxes": rows} for rows in BOXES]
    else:
        points = [[[[x1, y1]] for x1, y1, _, _ in rows] for rows in BOXES]
        prompts = [{"input_points": rows, "input_labels": [[1] for _ in rows]} for rows in points]
    both = {name: [one[name] for one in prompts] for name in prompts[0]}
    inputs = processor()(images=pictures(), text=[["cat", "dog"], ["moon"]], **both)
    assert inputs["prompt_counts"].tolist() == [3, 1]
    together = answer(inputs)
    for image, words in enumerate((["cat", "dog"], ["moon"])):
        given = {name: [rows] for name, rows in prompts[image].items()}
        (alone,) = answer(processor()(images=pictures()[image], text=words, **given))
        found = together[image]
        assert len(alone["scores"]) == len(BOXES[image]) and found["text_labels"] == alone["text_labels"]
        for name in ("scores", "mask_scores"):
            assert_close(found[name], alone[name], rtol=0, atol=1e-4)
        for name in ("labels", "prompt_ids", "masks", "boxes"):
            assert torch.equal(found[name], alone[name]), name
        assert [[word for word, _ in names] for names in found["topk"]] == [
            [word for word, _ in names] for names in alone["topk"]
        ]


def test_boxes_may_be_arrays():
    expected = processor()(images=picture(), input_boxes=BOXES[:1])
    for boxes in (torch.tensor(BOXES[:1]), np.array(BOXES[:1])):
        inputs = processor()(images=picture(), input_boxes=boxes)
        assert torch.equal(inputs["input_boxes"], expected["input_boxes"])
        assert inputs["prompt_counts"].tolist() == [3]


def test_clip_may_get_pixels_of_its_own(tmp_path):
    size = {"height": 64, "width": 64}
    stock = {"size": size, "do_center_crop": False, "image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    clip_images = {"image_processor_type": "CLIPImageProcessor"} | stock
    tiny_processor(clip_images=clip_images).save_pretrained(tmp_path)
    inputs = AutoProcessor.from_pretrained(tmp_path)(images=pictures())
    expected = CLIPImageProcessor(**stock)(pictures(), return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["clip_pixel_values"], expected) and expected.shape == (2, 3, 64, 64)
    assert torch.equal(inputs["pixel_values"], processor()(images=pictures())["pixel_values"])


def test_save_and_load(tmp_path):
    own = tiny_processor(text_padding="max_length", point_pad_value=-20)
    own.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is ovsam.OVSamProcessor
    assert loaded.to_dict() == own.to_dict()
    asked = {"images": pictures(), "text": ["cat", "red ball"], "input_points": [[[[5, 6]]], [[[7, 8]], [[9, 9]]]]}
    one, other = own(**asked), loaded(**asked)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one if name != "text_labels")


def test_to_moves_and_casts_all_tensors():
    inputs = processor()(images=pictures(), text=["cat"], input_boxes=BOXES).to("cpu", torch.float64)
    assert inputs["pixel_values"].dtype == inputs["input_boxes"].dtype == torch.float64
    assert inputs["input_ids"].dtype == torch.int64 and inputs["text_labels"] == ["cat"]
    with torch.no_grad():
        out, expected = (
            model()(**i) for i in (inputs, processor()(images=pictures(), text=["cat"], input_boxes=BOXES))
        )
    assert_close(out.pred_masks, expected.pred_masks, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------ masks out


def blocks(*squares):
    """Mask logits [1, n, 1, 32, 32]: 6 inside the squares (x1, y1, x2, y2 in cells), -6 outside."""
    logits = torch.full((1, len(squares), 1, 32, 32), -6.0)
    for index, (x1, y1, x2, y2) in enumerate(squares):
        logits[0, index, 0, y1:y2, x1:x2] = 6.0
    return logits


def proposals(masks, objectness, logits=None, negative=None, plain=False, **more):
    """As the model returns them for words: a word's score is its probability and the objectness, or, if `plain`, the
    probability alone."""
    objectness = torch.tensor([objectness])

    def scores(logits):
        if logits is None:
            return None
        score = torch.tensor([logits]).sigmoid()
        return score if plain else (score * objectness[..., None]).sqrt()

    return OVSamOutput(
        pred_masks=masks,
        objectness=objectness,
        scores=scores(logits),
        negative_scores=scores(negative),
        valid=torch.ones_like(objectness, dtype=torch.bool),
        **{"score_threshold": 0.3, **more},
    )


def post_process(outputs, **options):
    return processor().post_process_instance_segmentation(outputs, **options)[0]


APART = blocks((0, 0, 8, 8), (10, 0, 20, 8), (0, 10, 8, 20), (12, 12, 30, 30))


def test_scores_labels_and_order_by_hand():
    logits = [[0.0, -2.0], [3.0, 1.0], [-1.0, 4.0], [-9.0, -9.0]]
    found = post_process(proposals(APART, [0.5, 0.6, 0.9, 0.9], logits), text_labels=["cat", "dog"])
    best = torch.tensor([4.0, 3.0, 0.0]).sigmoid()
    assert_close(found["scores"], (best * torch.tensor([0.9, 0.6, 0.5])).sqrt())
    assert found["labels"].tolist() == [1, 0, 0] and found["text_labels"] == ["dog", "cat", "cat"]
    assert found["prompt_ids"].tolist() == [2, 1, 0]
    assert found["boxes"].tolist() == [[0, 10, 8, 20], [10, 0, 20, 8], [0, 0, 8, 8]]
    assert found["topk"][1] == [["cat", pytest.approx(0.7560, abs=1e-4)], ["dog", pytest.approx(0.6623, abs=1e-4)]]
    assert torch.equal(found["masks"][0], APART[0, 2, 0] > 0)
    assert_close(found["mask_scores"], torch.full((3,), 6.0).sigmoid())  # no iou: how sure the mask's own pixels are


def test_thresholds_and_sizes():
    out = proposals(APART, [0.5, 0.6, 0.9, 0.9], [[0.0], [3.0], [4.0], [-9.0]])
    assert post_process(out, threshold=0.8)["prompt_ids"].tolist() == [2]
    found = post_process(out, threshold=0.0, target_sizes=[(64, 96)])
    assert found["masks"].shape == (4, 64, 96) and found["boxes"][0].tolist() == [0, 20, 24, 40]
    assert found["text_labels"] == ["0"] * 4  # without names, words are numbered
    sure = post_process(out, threshold=0.0, mask_threshold=0.998)["masks"]
    assert not sure.any()  # sigmoid(6) = 0.99753
    assert len(post_process(out, threshold=0.0, text_labels=["cat"], top_k=1)["topk"][0]) == 1


def test_of_two_masks_of_one_object_the_better_stays():
    masks = blocks((0, 0, 10, 10), (0, 0, 10, 9), (0, 0, 10, 5), (20, 20, 20, 20))
    for threshold, kept in ((0.6, [1, 2]), (0.95, [1, 0, 2])):  # overlaps are 0.9, 0.56 and 0.5; one mask is empty
        out = proposals(masks, [0.8, 0.9, 0.7, 0.99], [[5.0]] * 4, mask_nms_threshold=threshold)
        assert post_process(out)["prompt_ids"].tolist() == kept


def test_instances_that_match_a_negative_word_better_are_dropped():
    logits, negative = [[2.0], [2.0], [2.0], [2.0]], [[-5.0, 1.9], [2.1, -5.0], [2.0, 0.0], [-5.0, -5.0]]
    for everything in (False, True):
        found = post_process(
            proposals(
                APART,
                [0.5, 0.6, 0.7, 0.8],
                logits,
                negative,
                everything,
                everything=everything,
                negative_labels=["moon", "sun"],
            ),
            text_labels=["cat"],
        )
        assert found["prompt_ids"].tolist() == [3, 0]
    negative = [[-1.0], [0.5], [1.0], [1.0]]
    unnamed = post_process(proposals(APART, [0.5, 0.6, 0.7, 0.8], None, negative, negative_labels=["moon"]))
    assert unnamed["prompt_ids"].tolist() == [3, 0]  # more likely the negative word than an object at all


def test_everything_is_ordered_by_objectness_and_scored_by_name():
    logits = [[3.0, 0.0], [-3.0, -4.0], [5.0, 5.0], [0.0, 1.0]]
    out = proposals(APART, [0.5, 0.9, 0.2, 0.8], logits, plain=True, everything=True)
    found = post_process(out, text_labels=["cat", "dog"])
    assert found["prompt_ids"].tolist() == [1, 3, 0] and found["text_labels"] == ["cat", "dog", "cat"]
    assert_close(found["scores"], torch.tensor([-3.0, 1.0, 3.0]).sigmoid())
    unnamed = post_process(proposals(APART, [0.5, 0.9, 0.2, 0.8]))
    assert unnamed["labels"].tolist() == [-1, -1, -1] and unnamed["text_labels"] == [None] * 3
    assert_close(unnamed["scores"], torch.tensor([0.9, 0.8, 0.5])) and unnamed["topk"] == [[]] * 3


def test_prompts_keep_their_order_their_best_candidate_and_no_threshold():
    masks = torch.cat([blocks((0, 0, 4, 4), (5, 5, 9, 9)), blocks((0, 0, 30, 30), (0, 0, 30, 30))], 2)  # M = 2
    out = OVSamOutput(
        pred_masks=masks,
        iou_scores=torch.tensor([[[0.2, 0.7], [0.9, 0.1]]]),
        scores=torch.tensor([[[-9.0, -8.0], [4.0, 0.0]]]).sigmoid(),
        valid=torch.ones(1, 2, dtype=torch.bool),
    )
    found = post_process(out, threshold=0.99, text_labels=["cat", "dog"])
    assert found["boxes"].tolist() == [[0, 0, 30, 30], [5, 5, 9, 9]] and found["text_labels"] == ["dog", "cat"]
    assert_close(found["mask_scores"], torch.tensor([0.7, 0.9]))
    assert_close(found["scores"], torch.tensor([-8.0, 4.0]).sigmoid())
    out.scores = None
    unnamed = post_process(out)
    assert unnamed["scores"].tolist() == [1, 1] and unnamed["text_labels"] == [None, None]
    assert unnamed["topk"] == [[], []] and unnamed["labels"].tolist() == [-1, -1]


def test_labels_index_the_words_of_the_image():
    lists = [["cat", "dog"], ["moon", "dog"], []]
    out = OVSamOutput(
        pred_masks=blocks((0, 0, 4, 4)).expand(3, -1, -1, -1, -1),
        scores=torch.tensor([[[0.1, 0.2, 0.9]], [[0.9, 0.2, 0.1]], [[0.1, 0.1, 0.1]]]),  # cat, dog, moon
        valid=torch.ones(3, 1, dtype=torch.bool),
    )
    found = processor().post_process_instance_segmentation(out, text_labels=lists)
    assert [one["labels"].tolist() for one in found] == [[1], [1], [-1]]
    assert [one["text_labels"] for one in found] == [["dog"], ["dog"], [None]]
    assert [[word for word, _ in one["topk"][0]] for one in found] == [["dog", "cat"], ["dog", "moon"], []]


def test_phrases_stand_for_labels():
    people = {"a pedestrian": "person", "cyclist": "person", "dog": "dog"}
    logits = [[0.0, 3.0, 1.0], [2.0, -1.0, 1.0], [-1.0, -1.0, 4.0], [-9.0, -9.0, -9.0]]
    out = proposals(APART, [1.0, 1.0, 1.0, 0.0], logits)
    found = post_process(out, text_labels=people)
    assert found["phrases"] == ["dog", "cyclist", "a pedestrian"] and found["text_labels"] == [
        "dog",
        "person",
        "person",
    ]
    assert found["labels"].tolist() == [1, 0, 0]
    best = torch.tensor([[4.0, -1.0], [3.0, 1.0], [2.0, 1.0]]).sigmoid().sqrt().tolist()
    for names, (first, second) in zip(found["topk"], best, strict=True):
        assert [score for _, score in names] == pytest.approx([first, second], abs=1e-4)
    words = [[word for word, _ in names] for names in found["topk"]]
    assert words == [["dog", "person"], ["person", "dog"], ["person", "dog"]]
    highest = {"person": 3.0, "dog": 4.0}
    assert found["presence"] == pytest.approx({k: torch.tensor(v).sigmoid().sqrt().item() for k, v in highest.items()})
    several = OVSamOutput(
        pred_masks=blocks((0, 0, 4, 4)).expand(2, -1, -1, -1, -1),
        scores=torch.tensor([[[0.1, 0.2, 0.9]], [[0.3, 0.2, 0.1]]]),  # a pedestrian, dog, cyclist
        valid=torch.ones(2, 1, dtype=torch.bool),
    )
    lists = [{"a pedestrian": "person", "dog": "dog"}, {"cyclist": "person", "a pedestrian": "person"}]
    found = processor().post_process_instance_segmentation(several, text_labels=lists)
    assert [one["phrases"] for one in found] == [["dog"], ["a pedestrian"]]
    assert [one["text_labels"] for one in found] == [["dog"], ["person"]]


def test_a_mapping_of_phrases_goes_through_the_processor():
    mapping = {"red ball": "ball", "cat": "cat"}
    inputs = processor()(images=pictures(), text=mapping).to("cpu")
    assert inputs["text_labels"] == mapping and len(inputs["input_ids"]) == 2 and word_mask(mapping) is None
    for found in answer(inputs, threshold=0.5):
        assert {mapping[phrase] for phrase in found["phrases"]} == set(found["text_labels"]) <= {"ball", "cat"}
    inputs = processor()(images=pictures(), text=[mapping, {"moon": "sky"}])
    assert word_mask(inputs["text_labels"]).tolist() == [[True, True, False], [False, False, True]]
    assert set(answer(inputs, threshold=0.5)[1]["text_labels"]) == {"sky"}


def test_dropped_instances_are_listed_with_their_reason():
    logits, negative = (
        [[2.0, 1.0], [0.0, 1.0], [2.0, 0.0], [-9.0, -9.0]],
        [[-5.0, 1.9], [2.1, -5.0], [-1.0, 4.0], [9, 9]],
    )
    found = post_process(
        proposals(APART, [1.0] * 4, logits, negative, plain=True, negative_labels=["moon", "star"]),
        text_labels=["cat", "dog"],
    )
    assert found["prompt_ids"].tolist() == [0]
    probability = torch.tensor([1.0, 2.1, 2.0, 4.0]).sigmoid().tolist()
    expected = [("dog", "moon", *probability[:2]), ("cat", "star", *probability[2:])]
    keys = ("text_label", "negative", "score", "negative_score")
    assert [tuple(one[key] for key in keys) for one in found["dropped"]] == [
        (label, word, pytest.approx(score), pytest.approx(other)) for label, word, score, other in expected
    ]  # instances under the threshold are not listed
    inputs = processor()(images=picture(), text=["cat"], negative_text="moon")
    assert inputs["negative_labels"] == ["moon"]


def test_a_word_that_is_its_own_negative_is_dropped_despite_rounding():
    logits = [[2.0, 1.0]]
    for rounding in (-1e-6, 0.0, 1e-6):
        found = post_process(
            proposals(APART[:1], [1.0], logits, [[2.0 + rounding]], plain=True, negative_labels=["cat"]),
            text_labels=["cat", "dog"],
        )
        assert len(found["scores"]) == 0 and found["dropped"][0]["negative"] == "cat"


def test_other_kinds_of_nms():
    masks = blocks((0, 0, 10, 10), (0, 0, 10, 9), (20, 20, 20, 20))  # IoU 0.9; the last is empty
    out = proposals(masks, [1.0, 1.0, 1.0], [[2.0, 0.0], [0.0, 1.0], [5.0, 5.0]], plain=True, mask_nms_threshold=0.6)
    first, second = torch.tensor([2.0, 1.0]).sigmoid().tolist()
    own = processor().post_process_instance_segmentation

    def scores(**options):
        return own(out, threshold=0.05, text_labels=["cat", "dog"], **options)[0]["scores"].tolist()

    decay = math.exp(-(0.9**2) / 0.5)
    assert scores() == pytest.approx([first])
    assert scores(nms="matrix") == pytest.approx([first, decay * second], rel=1e-4)
    assert scores(per_word=True) == scores(nms=None) == pytest.approx([first, second])
    out.objectness, out.everything = torch.tensor([[0.2, 0.6, 0.9]]), True
    found = own(out, threshold=0.01, text_labels=["cat", "dog"], nms="matrix")[0]
    assert found["prompt_ids"].tolist() == [1, 0] and found["objectness"].tolist() == pytest.approx([0.6, 0.2])
    assert found["scores"].tolist() == pytest.approx([second, decay * first], rel=1e-4)
    with pytest.raises(InputError, match="no NMS 'best'; there are fast, matrix"):
        post_process(out, nms="best")


def test_rescoring_by_the_predicted_iou():
    out = proposals(
        APART, [1.0] * 4, [[2.0], [1.0], [0.5], [-9.0]], iou_scores=torch.tensor([[[0.5], [0.9], [1.2], [1.0]]])
    )
    best = torch.tensor([2.0, 1.0, 0.5]).sigmoid().sqrt() * torch.tensor([0.5, 0.9, 1.0])
    found = post_process(out, rescore=True, threshold=0.3)
    assert found["prompt_ids"].tolist() == [2, 1, 0]
    assert_close(found["scores"], best.flip(0))
    assert post_process(out, rescore=True, threshold=0.5)["prompt_ids"].tolist() == [2, 1]


def test_exclusive_masks_share_no_pixel():
    masks = blocks((0, 0, 10, 10), (5, 0, 20, 10), (2, 2, 4, 4), (30, 30, 32, 32))
    out = proposals(masks, [1.0] * 4, [[1.0], [3.0], [0.0], [2.0]])
    for coco in (False, True):
        found = post_process(out, exclusive=True, threshold=0.0, target_sizes=[(64, 64)], return_coco_annotation=coco)
        assert found["prompt_ids"].tolist() == [1, 3, 0]  # nothing is left of 2
        assert found["boxes"].tolist() == [[10, 0, 40, 20], [60, 60, 64, 64], [0, 0, 10, 20]]
        dense = torch.stack([torch.from_numpy(rle.decode(m)) for m in found["masks"]]) if coco else found["masks"]
        assert dense.sum(0).max() == 1 and dense[2].sum() == 200
    clicks = OVSamOutput(pred_masks=masks, iou_scores=torch.ones(1, 4, 1), valid=torch.ones(1, 4, dtype=torch.bool))
    found = post_process(clicks, exclusive=True)
    assert found["prompt_ids"].tolist() == [0, 1, 2, 3] and not found["masks"][2].any()  # of equals the first has it


def test_masks_are_enlarged_as_by_interpolate():
    torch.manual_seed(0)
    masks = torch.randn(1, 5, 1, 32, 32)
    masks[0, 1:, 0, :20], masks[0, 2:, 0, :, 9:] = -5, -5
    for size in ((96, 128), (75, 331), (20, 10), (32, 32)):
        expected = torch.nn.functional.interpolate(masks[0], size, mode="bilinear")[:, 0]
        for level in (0.5, 0.2):
            found = post_process(
                proposals(masks, [0.9, 0.8, 0.7, 0.6, 0.5], [[9.0]] * 5), target_sizes=[size], mask_threshold=level
            )
            assert (found["masks"] != (expected.sigmoid() > level)).sum() <= 2  # a pixel may be just at the threshold


@pytest.mark.parametrize("pads", [False, True])
def test_run_lengths_are_those_of_the_dense_masks(pads, monkeypatch):
    if pads:  # an image of 3:4 in a square
        monkeypatch.setattr(ovsam.OVSamProcessor, "picture_share", lambda self, height, width: (1.0, 0.75))
    torch.manual_seed(0)
    coarse = torch.randn(1, 20, 1, 8, 8)
    masks = torch.nn.functional.interpolate(coarse[:, :, 0], (32, 32), mode="bicubic")[:, :, None]
    out = proposals(masks, torch.rand(20).tolist(), [[4.0]] * 20)
    for size, level in (((96, 128), 0.5), ((75, 331), 0.3), ((20, 10), 0.6)):
        asked = {"target_sizes": [size], "mask_threshold": level, "threshold": 0.0}
        dense, lengths = post_process(out, **asked), post_process(out, **asked, return_coco_annotation=True)
        again = np.stack([rle.decode(mask) for mask in lengths["masks"]])
        assert again.shape == dense["masks"].shape and 0.2 < again.mean() < 0.9
        assert (again != dense["masks"].numpy()).mean() < 1e-4
        assert torch.equal(lengths["prompt_ids"], dense["prompt_ids"])
        assert (lengths["boxes"] - dense["boxes"]).abs().max() <= 1


def test_padding_is_cut_off(monkeypatch):
    monkeypatch.setattr(ovsam.OVSamProcessor, "picture_share", lambda self, height, width: (1.0, 0.5))
    out = proposals(blocks((8, 4, 16, 12)), [0.9], [[3.0]], pred_boxes=torch.tensor([[[32.0, 16, 64, 48]]]))
    found = post_process(out, target_sizes=[(160, 320)])
    assert found["boxes"].tolist() == [[80, 40, 160, 120]]
    (detected,) = processor().post_process_grounded_object_detection(out, target_sizes=[(160, 320)])
    assert detected["boxes"].tolist() == [[80, 40, 160, 120]]


@pytest.mark.slow
def test_300_masks_of_a_large_image_fit_into_memory():
    corners = torch.randint(0, 28, (300, 2), generator=torch.Generator().manual_seed(0)).tolist()
    masks = blocks(*((x, y, x + 4, y + 4) for x, y in corners))
    out = proposals(masks, [0.9] * 300, [[3.0]] * 300)
    tracker = LargestTensor()
    with tracker:
        found = post_process(out, target_sizes=[(3000, 4000)], return_coco_annotation=True, nms=None)
    assert len(found["masks"]) == 300 and tracker.bytes < 10e6  # a mask is at most 6 cells: 560 x 750 pixels
    assert rle.area(found["masks"][0]) == pytest.approx(375 * 500, rel=0.03)


class LargestTensor(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


# ------------------------------------------------------------------------------------------------ maps and boxes out


def test_semantic_maps_by_hand():
    masks = blocks((0, 0, 10, 10), (5, 0, 20, 10), (5, 0, 20, 10), (30, 30, 32, 32))
    masks[0, 0, 0, :10, 5:10] = 0.5  # unsure where they meet: 0.62
    out = proposals(masks, [1.0] * 4, [[2.0, -9.0], [-9.0, 1.0], [-9.0, 0.9], [-9.0, -9.0]], plain=True)
    options = {"text_labels": {"a cat": "cat", "dog": "dog"}, "threshold": 0.3}
    (labels,), (values,) = processor().post_process_semantic_segmentation(out, return_scores=True, **options)
    expected = torch.full((32, 32), -1)
    expected[:10, :5], expected[:10, 5:20] = 0, 1
    assert torch.equal(labels, expected)
    sure = torch.tensor(6.0).sigmoid()
    assert_close(
        values[0, [0, 6, 25]],
        torch.stack([torch.tensor(2.0).sigmoid() * sure, torch.tensor(1.0).sigmoid() * sure, 0 * sure]),
    )
    (large,) = processor().post_process_semantic_segmentation(out, target_sizes=[(96, 64)], **options)
    assert large.shape == (96, 64) and large[0, 0] == 0 and large[27, 37] == 1 and large[95, 63] == -1
    (strict,) = processor().post_process_semantic_segmentation(out, text_labels=["cat", "dog"], threshold=0.8)
    assert set(strict.unique().tolist()) == {-1, 0}
    (none,) = processor().post_process_semantic_segmentation(out, threshold=0.95)
    assert (none == -1).all()


def test_panoptic_is_mask2formers():
    """Against transformers' own function, where it and ours mean the same."""
    torch.manual_seed(0)
    masks = torch.nn.functional.interpolate(2 * torch.randn(1, 12, 4, 4), (32, 32), mode="bicubic")
    out = proposals(masks[:, :, None], [1.0] * 12, torch.randn(12, 3).tolist(), plain=True)
    scores, labels = out.scores[0].max(-1)
    order = scores.argsort(descending=True)
    order = order[scores[order] >= 0.3]
    inside = masks[0, order].sigmoid()
    # Theirs would let a pixel belong to a mask that is not there: under the threshold we give it no probability.
    reference, segments = compute_segments(
        torch.where(inside > 0.5, inside, 0.0), scores[order], labels[order], 1e-6, 0.1, set()
    )
    (found,) = processor().post_process_panoptic_segmentation(
        out, overlap_mask_area_threshold=0.1, text_labels=["cat", "dog", "cow"], nms=None
    )
    there = (inside > 0.5).any(0)
    assert len(segments) > 2
    assert [one["label_id"] for one in found["segments_info"]] == [one["label_id"] for one in segments]
    assert torch.equal(found["segmentation"][there], reference[there]) and (found["segmentation"][~there] == 0).all()


def test_panoptic_segments_may_be_fused():
    out = proposals(APART, [1.0] * 4, [[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [-9.0, -9.0]], plain=True)
    (found,) = processor().post_process_panoptic_segmentation(
        out, label_ids_to_fuse={0}, text_labels=["sky", "dog"], target_sizes=[(64, 64)]
    )
    dog, sky = found["segments_info"]
    assert (dog["id"], dog["label_id"], dog["label"], dog["was_fused"]) == (1, 1, "dog", False)
    assert (sky["id"], sky["label_id"], sky["label"], sky["was_fused"]) == (2, 0, "sky", True)
    assert sky["score"] == pytest.approx(torch.tensor(2.0).sigmoid().item())
    assert found["segmentation"].dtype == torch.int32 and found["segmentation"].shape == (64, 64)
    assert found["segmentation"][[5, 5, 30, 63], [5, 30, 5, 0]].tolist() == [2, 2, 1, 0]
    (empty,) = processor().post_process_panoptic_segmentation(out, threshold=0.99)
    assert empty["segments_info"] == [] and not empty["segmentation"].any()


def test_boxes_as_zero_shot_detectors_give_them():
    boxes = torch.tensor([[[0.0, 0, 32, 32], [40, 0, 80, 32], [0, 40, 32, 160], [48, 48, 120, 120]]])
    out = proposals(APART, [0.5, 0.6, 0.9, 0.9], [[0.0, -2.0], [3.0, 1.0], [-1.0, 4.0], [-9.0, -9.0]], pred_boxes=boxes)
    asked = {"text_labels": [["cat", "dog"]], "threshold": 0.3}
    (found,) = processor().post_process_grounded_object_detection(out, target_sizes=[(100, 200)], **asked)
    same = post_process(out, **asked)
    assert torch.equal(found["scores"], same["scores"]) and torch.equal(found["labels"], same["labels"])
    assert found["text_labels"] == ["dog", "cat", "cat"]
    assert_close(found["boxes"], torch.tensor([[0, 31.25, 50, 100], [62.5, 0, 125, 25], [0, 0, 50, 25]]))
    (relative,) = processor().post_process_grounded_object_detection(out, **asked)
    assert_close(relative["boxes"][1], torch.tensor([0.3125, 0, 0.625, 0.25]))


@torch.no_grad()
def test_another_word_changes_no_score():
    few, many = (processor()(images=picture(), text=words) for words in (["cat", "dog"], ["cat", "moon", "dog", "cup"]))
    one, other = (model()(**inputs, everything=True) for inputs in (few, many))
    assert one.scores.shape[1] > 3
    assert (one.scores - other.scores[..., [0, 2]]).abs().max() < 1e-4
    asked = [answer(inputs, threshold=0.0)[0]["presence"] for inputs in (few, many)]
    assert asked[1] | asked[0] == pytest.approx(asked[1], abs=1e-4) and asked[1].keys() > asked[0].keys()
    boxes = {"input_boxes": BOXES[:1]}
    one, other = (model()(**processor()(images=picture(), text=t, **boxes)) for t in (["cat"], ["star", "cat"]))
    assert (one.scores[..., 0] - other.scores[..., 1]).abs().max() < 1e-4
