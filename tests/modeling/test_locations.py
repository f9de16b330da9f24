"""The location of a prompt, and the ConceptHead's mask of a prompt beside the mask of the decoder."""

import pytest
import torch
import torch.nn.functional as F
from common import SIZE, D, tiny_model

from ovsam.errors import InputError
from ovsam.modeling.adapters.mask_head import mask_regions
from ovsam.modeling.locations import agreement, boxed_locations, pointed_locations
from ovsam.modeling.outputs import ConceptOutput
from ovsam.ops.masks import follow_clicks


@pytest.fixture
def concepts():
    """Three locations: the left half of 64 x 64 pixels, the right half, the whole."""
    boxes = torch.tensor([[[0.0, 0, 32, 64], [32, 0, 64, 64], [0, 0, 64, 64]]])
    return ConceptOutput(objectness=torch.tensor([[1.0, 1.0, 2.0]]), boxes=boxes)


def test_the_location_of_a_box(concepts):
    boxes = torch.tensor([[[1.0, 0, 33, 60], [30, 2, 64, 64], [2, 2, 62, 62]]])
    assert boxed_locations(concepts, boxes).tolist() == [[0, 1, 2]]


def test_the_locations_of_clicks(concepts):
    points = torch.tensor([[[[16.0, 32], [0, 0]], [[48, 32], [0, 0]], [[32, 32], [0, 0]], [[16, 32], [48, 32]]]])
    labels = torch.tensor([[[1, -10], [1, 0], [1, -10], [1, 1]]])
    index, fit = pointed_locations(concepts, points, labels, count=3)
    assert index[..., 0].tolist() == [[0, 1, 2, 2]]  # the centre of each, and both halves at once
    side = torch.tensor([32.0 * 64, 32 * 64, 64 * 64]).sqrt()
    objectness = concepts.objectness[0].sigmoid() ** 0.25 * side**-0.2
    centrality = (16 / 48) ** 0.5  # of the first click in the whole (FCOS, eq. 3)
    assert fit[0, 0].tolist() == pytest.approx([objectness[0].item(), (objectness[2] * centrality).item(), 0.0])
    assert fit[0, 3].tolist() == pytest.approx([(objectness[2] * centrality).item(), 0.0, 0.0])


def test_clicks_outside_of_the_image_have_no_location(concepts):
    points = torch.tensor([[[[64.0, 64.0]], [[-3.0, 5.0]]]])
    assert pointed_locations(concepts, points, torch.ones(1, 2, 1), count=2)[1].sum() == 0


def test_the_agreement_of_masks_with_clicks():
    """Two candidates for one prompt: the left half of their region, and the right half."""
    masks = torch.full((1, 2, 8, 8), -9.0)
    masks[0, 0, :, :4] = masks[0, 1, :, 4:] = 9.0
    regions = torch.tensor([[[10.0, 10, 50, 50]]]).repeat(1, 2, 1)
    points = torch.tensor([[[[15.0, 30], [45, 30], [0, 0]]]])
    found = agreement(masks, regions, points, torch.tensor([[[1, 0, -10]]]))
    assert found.shape == (1, 1, 2) and found[0, 0, 0] > 0.99 and found[0, 0, 1] < 0.01
    outside = agreement(masks, regions, torch.tensor([[[[60.0, 30]]]]), torch.tensor([[[1]]]))
    assert outside.sum() == 0


@pytest.fixture(scope="module")
def model():
    return tiny_model(mask_head_weight=0.5)


@pytest.fixture
def features(model):
    with torch.no_grad():
        return model.encode(torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))


@torch.no_grad()
def test_masks_of_the_head_are_added_to_the_masks_of_prompts(model, features):
    boxes = torch.tensor([[[10.0, 20, 60, 90], [70, 5, 125, 50]]])
    masks = model(features=features, input_boxes=boxes).pred_masks
    own = model.concepts.box_masks(features.concepts, boxes, SIZE)
    prompts = {"input_boxes": boxes, "input_masks": own}
    decoded = model.sam.select_masks(model.sam.decode(features.sam, **prompts), False).masks
    torch.testing.assert_close(masks, decoded + 0.5 * own[:, :, None].clamp(-5, 5), rtol=0, atol=1e-3)
    with pytest.raises(InputError, match=r"input_boxes must be a tensor \[B, P, 4\]"):  # before anything is computed
        model(features=features, input_boxes=boxes[0])


@torch.no_grad()
def test_without_refinement_a_box_has_the_mask_of_the_head(model, features):
    boxes = torch.tensor([[[10.0, 20, 60, 90]]])
    own = model.concepts.box_masks(features.concepts, boxes, SIZE)
    out = model(features=features, input_boxes=boxes, refine=False)
    assert torch.equal(out.pred_masks[:, :, 0], own) and out.iou_scores is None


@torch.no_grad()
def test_finer_masks_of_the_head_are_the_size_of_the_result():
    model = tiny_model(mask_head_weight=1.0)
    model.concepts.config.mask_stride = 2
    features = model.encode(torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
    boxes = torch.tensor([[[10.0, 20, 60, 90]]])
    own = model.concepts.box_masks(features.concepts, boxes, SIZE)
    assert own.shape == (1, 1, SIZE // 2, SIZE // 2)
    decoded = model.sam.decode(features.sam, input_boxes=boxes, input_masks=own)
    decoded = model.sam.select_masks(decoded, False).masks[:, 0]  # [1, 1, h, w]
    expected = F.interpolate(decoded, own.shape[-2:], mode="bilinear") + own.clamp(-5, 5)
    out = model(features=features, input_boxes=boxes, text_embeds=F.normalize(torch.randn(2, D), dim=-1))
    torch.testing.assert_close(out.pred_masks[:, 0], expected, rtol=0, atol=1e-3)
    assert out.logits.isfinite().all()


@torch.no_grad()
def test_a_click_has_the_mask_of_a_location_that_contains_it(model, features):
    points, labels = torch.tensor([[[[85.0, 40.0]], [[20.0, 90.0]]]]), torch.ones(1, 2, 1)
    masks, agreed = model.concepts.point_masks(features.concepts, points, labels, SIZE)
    index, fit = pointed_locations(features.concepts, points, labels, 16)
    for prompt in range(2):
        boxes = features.concepts.boxes[:, index[0, prompt]]
        regions = mask_regions(boxes)
        logits = model.concepts.mask_head(features.concepts.mask_features, regions)[-1]
        held = agreement(logits, regions, points[:, prompt : prompt + 1], labels[:, prompt : prompt + 1])
        inside, probability = logits[0] > 0, logits[0].sigmoid()
        certain = (probability * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
        best = (fit[0, prompt] * held[0, 0] * certain**6).argmax()
        expected = model.concepts.box_masks(features.concepts, boxes[:, best][:, None], SIZE)[0, 0]
        assert agreed[0, prompt] == held[0, 0, best]
        torch.testing.assert_close(masks[0, prompt], expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_click_that_no_location_contains_has_no_mask_of_the_head(model, features):
    outside = torch.tensor([[[[-50.0, -50.0]]]])
    masks, agreed = model.concepts.point_masks(features.concepts, outside, torch.ones(1, 1, 1), SIZE)
    assert masks.abs().sum() == agreed.sum() == 0


@torch.no_grad()
def test_a_given_mask_is_corrected(model, features):
    """With a box the mask itself; with clicks its mean with the mask of the best location, by that one's agreement."""
    mask = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 9
    click = {"input_points": torch.tensor([[[[85.0, 12.0]]]])}
    own, agreed = model.concepts.point_masks(features.concepts, click["input_points"], torch.ones(1, 1, 1), SIZE)
    mean = (mask.clamp(-5, 5) + agreed[..., None, None] * own.clamp(-5, 5)) / (1 + agreed[..., None, None])
    for prompt, prior in (({"input_boxes": torch.tensor([[[10.0, 20, 60, 90]]])}, mask), (click, mean)):
        found = model(features=features, input_masks=mask, **prompt).pred_masks
        decoded = model.sam.select_masks(model.sam.decode(features.sam, input_masks=prior, **prompt), False).masks
        expected = decoded + 0.5 * prior[:, :, None].clamp(-5, 5)
        if "input_points" in prompt:
            at = prompt["input_points"] * expected.shape[-1] / SIZE
            expected = follow_clicks(expected[:, :, 0], at, torch.ones(1, 1, 1))[:, :, None]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_masks_contain_positive_clicks_and_not_negative_ones(model, features):
    points = torch.tensor([[[[85.0, 40.0], [20.0, 90.0]], [[20.0, 90.0], [85.0, 40.0]]]])
    labels = torch.tensor([[[1, 0], [1, 0]]])
    masks = model(features=features, input_points=points, input_labels=labels).pred_masks[0, :, 0]
    at = (points[0] * masks.shape[-1] / SIZE).long()
    clicked = torch.stack([mask[row[:, 1], row[:, 0]] for mask, row in zip(masks, at, strict=True)])
    assert (clicked[:, 0] > 0).all() and (clicked[:, 1] < 0).all()


@torch.no_grad()
def test_three_masks_of_a_click_are_those_of_the_decoder(model, features):
    click = {"features": features, "input_points": torch.tensor([[[[85.0, 12.0]]]]), "multimask_output": True}
    plain = model(**click).pred_masks
    decoded = model.sam.decode(features.sam, input_points=click["input_points"])
    assert plain.shape[2] == 3 and torch.equal(plain, model.sam.select_masks(decoded, True).masks)


@torch.no_grad()
@pytest.mark.parametrize("question", [{"input_boxes": torch.tensor([[[10.0, 20, 60, 90]]])}, {"everything": True}])
def test_a_checkpoint_may_leave_out_the_decoder(features, question, monkeypatch):
    """With refine_boxes=False in the config and an adapter that reads no tokens, nothing is decoded, but all masks are
    classified; a call may still ask for refinement."""
    model = tiny_model(mask_head_weight=0.5, refine_boxes=False)
    model.clip2sam.token, model.clip2sam.reads_tokens = None, False
    words = F.normalize(torch.randn(2, D, generator=torch.Generator().manual_seed(0)), dim=-1)
    refined = model(features=features, text_embeds=words, refine=True, **question)
    monkeypatch.setattr(model.sam, "decode", None)
    plain = model(features=features, text_embeds=words, **question)
    assert plain.iou_scores is None and refined.iou_scores is not None
    assert plain.pred_masks.shape == refined.pred_masks.shape and not torch.equal(plain.pred_masks, refined.pred_masks)
    assert plain.class_embeds.shape == refined.class_embeds.shape and plain.logits.isfinite().all()
    with pytest.raises(TypeError):  # three masks of a prompt come from the decoder
        model(features=features, input_boxes=torch.tensor([[[10.0, 20, 60, 90]]]), multimask_output=True)
