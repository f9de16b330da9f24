"""The location of a prompt, and the prototype mask of that location beside the mask of the decoder."""

import pytest
import torch
from common import SIZE, tiny_model

from ovsam.errors import InputError
from ovsam.modeling.locations import boxed_locations, pointed_locations
from ovsam.modeling.outputs import ConceptOutput
from ovsam.ops.masks import crop


@pytest.fixture
def concepts():
    """Three locations on a 16 x 16 grid of stride 4: the left half, the right half, the whole; one prototype each."""
    prototypes = torch.full((1, 3, 16, 16), -9.0)
    prototypes[0, 0, :, :8] = prototypes[0, 1, :, 8:] = prototypes[0, 2] = 9.0
    boxes = torch.tensor([[[0.0, 0, 32, 64], [32, 0, 64, 64], [0, 0, 64, 64]]])
    objectness = torch.tensor([[1.0, 1.0, 2.0]])
    return ConceptOutput(objectness=objectness, boxes=boxes, coefficients=torch.eye(3)[None], prototypes=prototypes)


def test_the_location_of_a_box(concepts):
    boxes = torch.tensor([[[1.0, 0, 33, 60], [30, 2, 64, 64], [2, 2, 62, 62]]])
    assert boxed_locations(concepts, boxes).tolist() == [[0, 1, 2]]


def test_the_location_of_clicks(concepts):
    points = torch.tensor([[[[10.0, 20], [50, 20]], [[10, 20], [50, 20]], [[50, 20], [10, 20]], [[50, 20], [0, 0]]]])
    labels = torch.tensor([[[1, 1], [1, 0], [1, 0], [0, -10]]])
    found = pointed_locations(concepts, points, labels, stride=4.0)
    assert found.tolist() == [
        [2, 0, 1, 0]
    ]  # both halves; the left, not the right; the right, not the left; not the right


def test_clicks_at_the_edge(concepts):
    points = torch.tensor([[[[64.0, 64.0]], [[-3.0, 5.0]]]])
    assert pointed_locations(concepts, points, torch.ones(1, 2, 1), stride=4.0).shape == (1, 2)


@pytest.fixture(scope="module")
def model():
    return tiny_model(prototype_weight=0.5)


@pytest.fixture
def features(model):
    with torch.no_grad():
        return model.encode(torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))


@torch.no_grad()
def test_prototypes_are_added_to_the_masks_of_prompts(model, features):
    boxes = torch.tensor([[[10.0, 20, 60, 90], [70, 5, 125, 50]]])
    masks = model(features=features, input_boxes=boxes).pred_masks
    at = boxed_locations(features.concepts, boxes)[0]
    prototypes = torch.einsum("pq,qhw->phw", features.concepts.coefficients[0, at], features.concepts.prototypes[0])
    prompts = {"input_boxes": boxes, "input_masks": crop(prototypes[None], boxes / 4)}
    decoded = model.sam.select_masks(model.sam.decode(features.sam, **prompts), False).masks
    torch.testing.assert_close(masks, decoded + 0.5 * prompts["input_masks"][:, :, None], rtol=0, atol=1e-3)
    with pytest.raises(InputError, match=r"input_boxes \[B, P, 4\]"):  # before anything is computed
        model(features=features, input_boxes=boxes[0])


@torch.no_grad()
def test_a_given_mask_takes_the_place_of_a_prototype(model, features):
    click = {"features": features, "input_points": torch.tensor([[[[85.0, 12.0]]]])}
    first = model(**click).pred_masks[:, :, 0]
    decoded = model.sam.decode(features.sam, input_points=click["input_points"], input_masks=first)
    again = model(**click, input_masks=first).pred_masks
    assert torch.equal(again, model.sam.select_masks(decoded, False).masks)


@torch.no_grad()
def test_three_masks_of_a_click_are_those_of_the_decoder(model, features):
    click = {"features": features, "input_points": torch.tensor([[[[85.0, 12.0]]]]), "multimask_output": True}
    plain = model(**click).pred_masks
    decoded = model.sam.decode(features.sam, input_points=click["input_points"])
    assert plain.shape[2] == 3 and torch.equal(plain, model.sam.select_masks(decoded, True).masks)
