"""The whole model: three questions, features that are reused, batches, compositions."""

import functools

import pytest
import torch
from common import SIZE, WORDS, picture, tiny_model, tiny_processor
from torch.nn.functional import interpolate
from torch.testing import assert_close
from torchvision.ops import box_iou
from transformers import pipeline

from ovsam import InputError
from ovsam.modeling.scoring import clip_scale_shift
from ovsam.ops.boxes import masks_to_boxes
from ovsam.ops.scores import instance_scores

COMPOSITIONS = {  # composition, SAM side, CLIP side
    "dual": ("dual", "edgetam", "dual_encoder"),
    "dual, SAM 2 and ConvNeXt": ("dual", "sam2", "convnext"),
    "dual, SAM 2 and ResNet": ("dual", "sam2", "resnet"),
    "clip": ("clip", "edgetam", "dual_encoder"),
    "clip, SAM 2 and ConvNeXt": ("clip", "sam2", "convnext"),
    "sam": ("sam", "edgetam", "dual_encoder"),
    "sam, SAM 2 and CLIP": ("sam", "sam2", "clip"),
}
compositions = pytest.mark.parametrize("kind", COMPOSITIONS)

THRESHOLD = 0.5
POINTS = {
    "input_points": [[[[20, 30], [40, 50]], [[90, 30], [5, 5]]], [[[110, 80], [1, 2]], [[64, 64], [120, 9]]]],
    "input_labels": [[[1, 0], [1, 1]], [[1, 1], [1, 0]]],
}
BOXES = {"input_boxes": [[[10, 20, 60, 90], [70, 5, 125, 50]], [[30, 30, 100, 110], [2, 60, 40, 120]]]}
MASKS = {"input_masks": 4 * torch.randn(2, 2, SIZE // 4, SIZE // 4, generator=torch.Generator().manual_seed(3))}
PROMPTS = {
    "points": POINTS,
    "boxes": BOXES,
    "masks": MASKS,
    "points and boxes": POINTS | BOXES,
    "boxes and masks": BOXES | MASKS,
}


@functools.cache
def model_of(kind="dual", adapters=True):
    """One model per kind for all tests, which leave it as it is."""
    return tiny_model(*COMPOSITIONS.get(kind, (kind,)), adapters=adapters)


@functools.cache
def processor():
    return tiny_processor()


def pictures():
    return [picture(0), picture(1, width=200, height=90)]


def inputs_for(images=None, **asked):
    return processor()(images=pictures() if images is None else images, **asked)


@torch.no_grad()
def ask(model, **inputs):
    return model(**inputs)


def tensors_of(output):
    return [name for name, value in output.items() if isinstance(value, torch.Tensor)]


def assert_same(actual, expected):
    """All tensors of two outputs but the features, to the last bit."""
    assert actual.keys() == expected.keys()
    for name in tensors_of(expected):
        assert torch.equal(actual[name], expected[name]), name


def assert_near(actual, expected):
    """To 1e-4 of the largest: mask logits and pixels go up to a few hundred."""
    scale = float(expected.abs().max().clamp(min=1))
    assert_close(actual, expected, rtol=0, atol=1e-4 * scale)


# ------------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_many_prompts_at_once_are_as_one_by_one(prompts):
    model, inputs = model_of(), inputs_for(text=["cat", "dog"], **prompts)
    together = ask(model, **inputs)
    for image in range(2):
        for prompt in range(2):
            one = {name: inputs[name][image : image + 1, prompt : prompt + 1] for name in prompts}
            words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            alone = ask(model, pixel_values=inputs["pixel_values"][image : image + 1], **words, **one)
            for name in ("pred_masks", "iou_scores", "pred_boxes", "class_embeds", "logits"):
                assert_near(alone[name][0, 0], together[name][image, prompt])
    flat = together.pred_masks.flatten(0, 1)
    assert min((flat[i] - flat[j]).abs().max() for i in range(4) for j in range(i)) > 0.1  # they are four questions


def test_every_kind_of_prompt_changes_the_masks():
    masks = [ask(model_of(), **inputs_for(**prompts)).pred_masks for prompts in PROMPTS.values()]
    assert min((masks[i] - masks[j]).abs().max() for i in range(len(masks)) for j in range(i)) > 0.1


def test_three_masks_and_the_name_of_the_best(monkeypatch):
    model, inputs = model_of(), inputs_for(text=["cat", "dog"], **BOXES)
    with torch.no_grad():
        features = model.encode(inputs["pixel_values"])
        decoded = model.sam.decode(features.sam, input_boxes=inputs["input_boxes"])
    decoded.iou = torch.tensor([[[9, 0.5, 0.6, 0.4], [9, 0.5, 0.6, 0.7]], [[9, 0.2, 0.1, 0.1], [0, 0.3, 0.8, 0.5]]])
    monkeypatch.setattr(model.sam, "decode", lambda *features, **prompts: decoded)  # all prompts like one, untrained
    out = ask(model, multimask_output=True, **inputs)
    assert torch.equal(out.pred_masks, decoded.masks[:, :, 1:]) and torch.equal(out.iou_scores, decoded.iou[:, :, 1:])
    best = out.iou_scores.argmax(-1)
    assert best.tolist() == [[1, 2], [0, 1]]
    mask = out.pred_masks.take_along_dim(best[..., None, None, None], 2)[:, :, 0]
    token = decoded.tokens[:, :, 1:].take_along_dim(best[..., None, None], 2)[:, :, 0]
    assert torch.equal(out.pred_boxes, masks_to_boxes(mask > 0) * 4)
    with torch.no_grad():
        embeds = model.clip2sam(out.features.maps, inputs["input_boxes"], mask.sigmoid(), token)
    assert torch.equal(out.class_embeds, embeds)  # of the best mask, in the box of the prompt


def test_logits_of_prompts_are_scaled_and_shifted_cosines():
    model, inputs = model_of(), inputs_for(text=["cat", "red ball", "dog"], negative_text="moon", **BOXES)
    out = ask(model, **inputs)
    with torch.no_grad():
        words = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        given = ask(model, text_embeds=words[:3], features=out.features, input_boxes=inputs["input_boxes"])
    assert_close(words.norm(dim=-1), torch.ones(4))
    words, moon = words.split([3, 1])  # the negative word is the last
    cosine = torch.cosine_similarity(out.class_embeds[:, :, None], words, dim=-1)
    by_hand = (cosine + model.clip2sam.logit_shift) * model.clip2sam.log_scale.exp()
    assert_close(out.logits, by_hand.detach(), rtol=0, atol=1e-4)
    assert torch.equal(given.logits, out.logits)
    by_hand = model.clip2sam.logits(out.class_embeds, moon).detach()
    assert_close(out.negative_logits, by_hand, rtol=0, atol=1e-4)
    assert out.logits.std() > 0.1


def test_prompts_without_words_have_masks_and_no_logits():
    out, named = (ask(model_of(), **inputs_for(**BOXES, **words)) for words in ({}, {"text": "cat"}))
    assert out.logits is None and out.objectness is None and out.valid.all()
    assert torch.equal(out.pred_masks, named.pred_masks) and torch.equal(out.class_embeds, named.class_embeds)


# ------------------------------------------------------------------------------------------------ where is it?


def locations(out):
    """Which location of the ConceptHead each instance is [B, I]: no two have the same objectness."""
    return (out.objectness[:, :, None] == out.features.concepts.objectness.sigmoid()[:, None]).float().argmax(-1)


def test_instances_of_words_are_locations_of_the_concept_head():
    model, inputs = tiny_model(nms_threshold=0.5, mask_nms_threshold=1.0), inputs_for(text=["cat", "dog"])
    out = ask(model, refine=False, proposal_threshold=THRESHOLD, **inputs)
    concepts, place = out.features.concepts, locations(out)
    assert out.valid.sum() > 10 and not torch.equal(*out.valid.sum(1))
    with torch.no_grad():
        words = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    scores = []
    for image, instance in out.valid.nonzero().tolist():
        at = place[image, instance]
        cosine = words @ concepts.embeds[image, at]
        logits = (cosine + concepts.logit_shift[image, at]) * concepts.logit_scale[image, at]
        assert_close(out.logits[image, instance], logits, rtol=0, atol=1e-4)
        objectness = concepts.objectness[image, at].sigmoid()
        assert_close(out.objectness[image, instance], objectness)
        scores.append((logits.max().sigmoid() * objectness).sqrt())
    assert min(scores) > THRESHOLD
    # Kept are the scores over the threshold, unless a higher one overlaps (Fast NMS: kept or not itself).
    everywhere = (concepts.embeds @ words.T + concepts.logit_shift) * concepts.logit_scale
    scores = instance_scores(everywhere.amax(-1), concepts.objectness.sigmoid())
    for image in range(2):
        score, order = scores[image].sort(descending=True)
        order = order[score > THRESHOLD]
        overlap = box_iou(concepts.boxes[image, order], concepts.boxes[image, order])
        expected = [int(at) for rank, at in enumerate(order) if (overlap[rank, :rank] <= 0.5).all()]
        assert place[image][out.valid[image]].tolist() == expected
        assert 5 < len(expected) < len(order)


def test_logits_of_words_are_averaged_with_the_adapter():
    model, inputs = tiny_model(), inputs_for(text=["cat", "dog"], negative_text="moon")
    plain = ask(model, refine=False, proposal_threshold=THRESHOLD, **inputs)
    out = ask(model, proposal_threshold=THRESHOLD, **inputs)
    assert not torch.equal(out.class_embeds, plain.class_embeds)
    with torch.no_grad():
        rows = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).split([2, 1])
        for name, words in zip(("logits", "negative_logits"), rows, strict=True):
            assert_close(
                out[name], (plain[name] + model.clip2sam.logits(out.class_embeds, words)) / 2, rtol=0, atol=1e-4
            )


@pytest.mark.parametrize("refine", [True, False])
def test_masks_of_instances(refine):
    model, inputs = model_of(), inputs_for(text=["cat", "dog"])
    out = ask(model, refine=refine, proposal_threshold=THRESHOLD, **inputs)
    concepts, place = out.features.concepts, locations(out)
    image, instance = 1, 2
    at = place[image, instance]
    with torch.no_grad():
        own = model.concepts.box_masks(concepts, concepts.boxes[:, at : at + 1], SIZE)[image, 0]
    assert (own == -20).any() and (own > -20).any()  # empty outside of the region
    mask = out.pred_masks[image, instance, 0]
    if not refine:
        assert out.iou_scores is None
        assert_close(mask, own, rtol=0, atol=1e-4)
        return
    features = type(out.features.sam)(
        embedding=out.features.sam.embedding[image:][:1],
        high_res=[level[image:][:1] for level in out.features.sam.high_res],
    )
    with torch.no_grad():
        decoded = model.sam.decode(
            features, input_boxes=out.pred_boxes[image, instance][None, None], input_masks=own[None, None]
        )
        decoded = model.sam.select_masks(decoded, multimask_output=False)
    assert_close(mask, decoded.masks[0, 0, 0], rtol=0, atol=1e-4)
    assert_close(out.iou_scores[image, instance], decoded.iou[0, 0], rtol=0, atol=1e-4)
    assert (mask - own).abs().max() > 0.1


def test_another_word_changes_no_score():
    """Before non-maximum suppression, which is about instances."""
    model = tiny_model(nms_threshold=1.0, mask_nms_threshold=1.0, max_detections=1000)
    kept = {}
    for words in (("cat",), ("cat", "dog"), ("moon", "cat", "star", "car")):
        out = ask(model, proposal_threshold=0.0, refine=False, **inputs_for(text=list(words)))
        order = locations(out).argsort(1)
        logits = out.logits[:, :, words.index("cat")].gather(1, order)
        kept[words] = logits
        assert logits.shape[1] == 80  # every location: 8 x 8 and 4 x 4
    first, *others = kept.values()
    assert first.std() > 0.1
    for other in others:
        assert_close(other, first, rtol=0, atol=1e-4)


def test_words_per_image_equal_separate_calls():
    model = model_of()
    lists = [["cat", "red ball"], ["dog"]]
    together = ask(model, proposal_threshold=THRESHOLD, **inputs_for(text=lists))
    assert together.valid.sum(1).min() > 3
    for image, words in enumerate(lists):
        alone = ask(model, proposal_threshold=THRESHOLD, **inputs_for(images=pictures()[image], text=words))
        count = int(together.valid[image].sum())
        assert alone.valid.sum() == count
        for name in ("pred_masks", "pred_boxes", "objectness", "iou_scores"):
            assert_near(together[name][image, :count], alone[name][0])
    asked = torch.tensor([[True, True, False], [False, False, True]])
    unasked = together.logits.masked_select(~asked[:, None])
    assert (unasked.sigmoid() == 0).all() and (together.logits.masked_select(asked[:, None]).abs() < 1e3).all()


def test_an_image_without_words_has_no_instances():
    out = ask(model_of(), proposal_threshold=0.0, **inputs_for(text=[["cat"], []]))
    assert out.valid[0].any() and not out.valid[1].any()


def test_an_empty_answer():
    model, inputs = model_of(), inputs_for(text=["cat"], negative_text=["dog"])
    out = ask(model, proposal_threshold=1.0, **inputs)
    assert out.pred_masks.shape == (2, 0, 1, 32, 32) and out.logits.shape == (2, 0, 1)
    for result in processor().post_process_instance_segmentation(out, target_sizes=[(50, 40), (30, 20)]):
        assert result.pop("presence") == {"cat": 0.0}
        assert all(len(value) == 0 for value in result.values())
    assert result["masks"].shape == (0, 30, 20) and result["boxes"].shape == (0, 4)


# ------------------------------------------------------------------------------------------------ everything


def test_everything_is_selected_by_objectness_for_any_words():
    model = model_of()
    unnamed = ask(model, proposal_threshold=THRESHOLD, **inputs_for())
    named = ask(model, proposal_threshold=THRESHOLD, everything=True, **inputs_for(text=["cat", "dog"]))
    others = ask(model, proposal_threshold=THRESHOLD, everything=True, **inputs_for(text=["moon", "star"]))
    assert unnamed.logits is None and named.valid.sum() > 10
    for out in (named, others):
        for name in ("pred_masks", "pred_boxes", "objectness", "valid"):
            assert torch.equal(out[name], unnamed[name])
    assert (named.logits - others.logits).abs().max() > 0.1
    for image in range(2):
        objectness = unnamed.objectness[image][unnamed.valid[image]]
        assert torch.equal(objectness, objectness.sort(descending=True).values) and objectness.min() > THRESHOLD
    # Names are those of the masks, by the Clip2SamAdapter, not those of the locations.
    words = inputs_for(text=["cat", "dog"])
    by_words = ask(model, features=named.features, input_ids=words["input_ids"], proposal_threshold=0.0)
    for image in range(2):
        place = {tuple(box.tolist()): index for index, box in enumerate(by_words.pred_boxes[image])}
        box = tuple(named.pred_boxes[image, 0].tolist())
        assert box not in place or (by_words.logits[image, place[box]] - named.logits[image, 0]).abs().max() > 0.01


# ------------------------------------------------------------------------------------------------ features, batches


QUESTIONS = {
    "prompts": {"text": ["cat", "dog"]} | BOXES,
    "words": {"text": ["cat", "dog"]},
    "everything": {},
}
questions = pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)


@compositions
@questions
def test_features_are_computed_once_and_answer_again(kind, question, monkeypatch):
    model, inputs = model_of(kind), inputs_for(**question)
    calls = []
    for side in ("sam.encode", "clip.encode_image", "sam2clip.forward", "concepts.forward"):
        part, name = side.split(".")
        if getattr(model, part) is not None:
            own = getattr(getattr(model, part), name)
            monkeypatch.setattr(
                getattr(model, part), name, lambda *a, own=own, side=side: (calls.append(side), own(*a))[1]
            )
    first = ask(model, proposal_threshold=THRESHOLD, **inputs)
    encoders = {"dual": ["clip.encode_image", "sam.encode"], "clip": ["clip.encode_image", "sam2clip.forward"]}
    assert calls == [*encoders.get(kind.split(",")[0], ["sam.encode"]), "concepts.forward"]
    calls.clear()
    del inputs["pixel_values"]
    again = ask(model, features=first.features, proposal_threshold=THRESHOLD, **inputs)
    assert not calls
    assert_same(again, first)
    with torch.no_grad():
        features = model.encode(inputs_for()["pixel_values"])
    assert_same(ask(model, features=features, proposal_threshold=THRESHOLD, **inputs), first)
    with torch.no_grad():
        features = model.encode(inputs_for()["pixel_values"], concepts=False)
    assert features.concepts is None  # until the first question, as in video
    assert_same(ask(model, features=features, proposal_threshold=THRESHOLD, **inputs), first)
    assert features.concepts is not None and len(first.valid[0]) > 1


@compositions
@questions
def test_an_image_has_the_same_results_in_a_batch(kind, question):
    model, inputs = model_of(kind), inputs_for(**question)
    together = ask(model, proposal_threshold=THRESHOLD, **inputs)
    for image in range(2):
        one = {n: v[image : image + 1] for n, v in inputs.items() if n in ("pixel_values", "input_boxes")}
        words = {n: inputs[n] for n in ("input_ids", "attention_mask") if n in inputs}
        alone = ask(model, proposal_threshold=THRESHOLD, **one, **words)
        count = int(together.valid[image].sum())
        assert count == alone.valid.sum() and count > 1
        for name in set(tensors_of(alone)) - {"valid"}:
            assert_near(together[name][image, :count].float(), alone[name][0, :count].float())


# ------------------------------------------------------------------------------------------------ compositions


@compositions
def test_image_prompt_and_word_all_matter(kind):
    model = model_of(kind)
    out = ask(model, **inputs_for(text=["cat", "dog"], **BOXES))
    swapped = ask(model, **inputs_for(images=pictures()[::-1], text=["cat", "dog"], **BOXES))
    assert (out.pred_masks - swapped.pred_masks).abs().max() > 0.1
    assert (out.logits - swapped.logits).abs().max() > 0.1
    assert (out.pred_masks[:, 0] - out.pred_masks[:, 1]).abs().max() > 0.1
    assert (out.logits[:, 0] - out.logits[:, 1]).abs().max() > 0.01
    assert (out.logits[..., 0] - out.logits[..., 1]).abs().max() > 0.01
    composition = kind.split(",")[0]
    assert (model.sam.model.vision_encoder is None) == (composition == "clip")
    assert (out.features.clip is None) == (composition == "sam")
    assert model.get_text_features(torch.tensor([[62, 5, 63]])).shape == (1, 32)
    image_side = [name for name, _ in model.clip.named_parameters() if "vis" in name]
    assert bool(image_side) == (composition != "sam")


@pytest.mark.parametrize("clip", ["dual_encoder", "clip", "siglip", "resnet", "convnext"])
def test_without_adapters_names_are_clips_own(clip):
    model = tiny_model("dual", "edgetam", clip, adapters=False)
    tokens = tiny_processor(text_padding="max_length")  # SigLIP's wish, which does no harm to others
    inputs = tokens(images=pictures(), text=["cat", "dog", "moon"], **BOXES)
    out = ask(model, **inputs)
    with torch.no_grad():
        words = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        regions = model.clip.pool(out.features.clip, masks=out.pred_masks[:, :, 0].sigmoid())
    assert_close(out.class_embeds, regions, rtol=0, atol=1e-6)
    scale, shift = clip_scale_shift(model.clip)
    assert_close(out.logits, (regions @ words.T + shift) * scale, rtol=0, atol=1e-3)
    assert out.logits.std() > 0.05
    for asked in ({"input_ids": inputs["input_ids"]}, {}):
        with pytest.raises(InputError, match="no ConceptHead"):
            ask(model, features=out.features, **asked)


def test_clip_pixels_may_have_another_size():
    """Regions are given to CLIP as masks: boxes are pixels of SAM's input."""
    model = tiny_model("dual", "edgetam", "resnet", adapters=False)
    inputs = inputs_for(text=["cat", "dog"], **BOXES)
    inputs["clip_pixel_values"] = interpolate(inputs["pixel_values"], scale_factor=2)
    out = ask(model, **inputs)
    with torch.no_grad():
        twice = model.clip.pool(out.features.clip, boxes=2 * out.pred_boxes)
    assert_close(out.class_embeds, twice, rtol=0, atol=1e-5)
    assert (out.class_embeds - ask(model, **inputs | {"clip_pixel_values": None}).class_embeds).abs().max() > 0.01


def test_without_a_clip2sam_adapter_locations_name_prompts():
    model = tiny_model(clip2sam_config=None)
    out = ask(model, **inputs_for(text=["cat", "dog"], **BOXES))
    concepts = out.features.concepts
    with torch.no_grad():
        words = model.get_text_features(inputs_for(text=["cat", "dog"])["input_ids"])
    for image in range(2):
        fit = box_iou(inputs_for(**BOXES)["input_boxes"][image], concepts.boxes[image])
        for prompt, best in enumerate((fit * concepts.objectness[image].sigmoid()).argmax(1)):
            cosine = words @ concepts.embeds[image, best]
            by_hand = (cosine + concepts.logit_shift[image, best]) * concepts.logit_scale[image, best]
            assert_close(out.logits[image, prompt], by_hand, rtol=0, atol=1e-4)


def test_without_a_concept_head_prompts_are_classified_and_words_raise_an_error():
    model = tiny_model(concepts_config=None)
    out = ask(model, **inputs_for(text=["cat", "dog"], **BOXES))
    assert out.logits.std() > 0.01 and out.features.concepts is None
    with pytest.raises(InputError, match="no ConceptHead"):
        ask(model, **inputs_for(text=["cat"]))


# ------------------------------------------------------------------------------------------------ mistakes, SAM's way


def test_calls_without_an_image_raise_an_error():
    with pytest.raises(InputError, match="pixel_values, or features"):
        model_of()(input_ids=torch.tensor([[62, 5, 63]]))
    model, inputs = model_of(), inputs_for(text=["cat"])
    with torch.no_grad():
        features = model.encode(inputs["pixel_values"])
    features.concepts.mask_features = None
    with pytest.raises(InputError, match="refine=False needs masks of the ConceptHead"):
        ask(model, features=features, input_ids=inputs["input_ids"], refine=False)


@compositions
def test_image_embeddings_are_passed_back_as_in_sam(kind):
    model, inputs = model_of(kind), inputs_for(**POINTS)
    with torch.no_grad():
        embeddings = model.get_image_embeddings(inputs.pop("pixel_values"))
    assert [level.shape[-1] for level in embeddings] == [32, 16, 8]
    masks = ask(model, image_embeddings=embeddings, **inputs)
    expected = ask(model, **inputs_for(**POINTS))
    assert torch.equal(masks.pred_masks, expected.pred_masks) and torch.equal(masks.iou_scores, expected.iou_scores)
    assert masks.class_embeds is None


def test_transformers_mask_generation_pipeline(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    generate = pipeline("mask-generation", model=str(tmp_path))
    image = picture(1, width=90, height=90)  # the points of that pipeline are correct on square images only
    found = generate(
        image, points_per_crop=4, points_per_batch=8, pred_iou_thresh=0, stability_score_thresh=0, crops_nms_thresh=1
    )
    assert len(found["masks"]) > 1 and found["masks"][0].shape == (90, 90)
    grid = [[[[22.5 * x + 11.25, 22.5 * y + 11.25]] for y in range(4) for x in range(4)]]
    out = ask(model, **inputs_for(images=image, input_points=grid))
    expected = processor().post_process_instance_segmentation(out, target_sizes=[(90, 90)])[0]["masks"]
    for mask in found["masks"]:  # each is the mask of one of the sixteen points
        assert max((torch.as_tensor(mask) == one).float().mean() for one in expected) > 0.999


def test_limits_are_those_of_the_config():
    inputs = inputs_for(text=list(WORDS))
    model = tiny_model(proposal_threshold=0.7, max_detections=4)
    out, every = ask(model, **inputs), ask(model_of(), proposal_threshold=0.7, **inputs)
    assert every.valid.shape[1] > 4 == out.valid.shape[1]
    assert torch.equal(out.pred_boxes, every.pred_boxes[:, :4])
    few = tiny_model(max_locations=10, nms_threshold=1.0, mask_nms_threshold=1.0)
    few = ask(few, proposal_threshold=0.0, everything=True, **inputs)
    objectness = few.features.concepts.objectness.sigmoid().topk(10).values
    assert torch.equal(few.objectness, objectness)


def test_a_misspelt_argument_is_an_error():
    model, pixels = tiny_model(), torch.zeros(1, 3, SIZE, SIZE)
    with pytest.raises(TypeError, match="threshhold"):
        model(pixel_values=pixels, threshhold=0.9)
    with pytest.raises(TypeError, match="positional"):
        model(pixels)
