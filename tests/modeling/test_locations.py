"""Prototype masks help the decoder: which location a prompt means, and what that gains on held-out scenes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as rle

import ovsam
from ovsam.errors import InputError
from ovsam.modeling.locations import boxed_locations, pointed_locations
from ovsam.modeling.outputs import ConceptOutput

VAL = Path(__file__).parents[1] / "data" / "emojiscenes-val"


@pytest.fixture
def concepts():
    """Three locations on a 16 x 16 grid of stride 4: the left half, the right half, the whole; one prototype each."""
    prototypes = torch.full((1, 3, 16, 16), -9.0)
    prototypes[0, 0, :, :8] = prototypes[0, 1, :, 8:] = prototypes[0, 2] = 9.0
    boxes = torch.tensor([[[0.0, 0, 32, 64], [32, 0, 64, 64], [0, 0, 64, 64]]])
    objectness = torch.tensor([[1.0, 1.0, 2.0]])
    return ConceptOutput(objectness=objectness, boxes=boxes, coefficients=torch.eye(3)[None], prototypes=prototypes)


def test_a_box_means_the_location_that_fits_it(concepts):
    boxes = torch.tensor([[[1.0, 0, 33, 60], [30, 2, 64, 64], [2, 2, 62, 62]]])
    assert boxed_locations(concepts, boxes).tolist() == [[0, 1, 2]]


def test_clicks_mean_the_location_that_holds_them_all(concepts):
    points = torch.tensor([[[[10.0, 20], [50, 20]], [[10, 20], [50, 20]], [[50, 20], [10, 20]], [[50, 20], [0, 0]]]])
    labels = torch.tensor([[[1, 1], [1, 0], [1, 0], [0, -10]]])
    found = pointed_locations(concepts, points, labels, stride=4.0)
    assert found.tolist() == [[2, 0, 1, 0]]  # both halves; the left, not the right; the reverse; what is not right


def test_clicks_at_the_edge_are_no_error(concepts):
    points = torch.tensor([[[[64.0, 64.0]], [[-3.0, 5.0]]]])
    assert pointed_locations(concepts, points, torch.ones(1, 2, 1), stride=4.0).shape == (1, 2)


@pytest.fixture(scope="module")
def segmenter():
    return ovsam.load("ovsam-tiny")


def test_prototypes_make_masks_of_boxes_better(segmenter):
    """On four held-out scenes, against the decoder alone; and the question is refused before anything is computed."""
    data = json.loads((VAL / "annotations.json").read_text())
    model, weight = segmenter.model, segmenter.model.config.prototype_weight
    assert weight > 0
    overlap = {0.0: [], weight: []}
    for image in data["images"][:4]:
        objects = [a for a in data["annotations"] if a["image_id"] == image["id"]]
        truth = np.stack([rle.decode(a["segmentation"]).astype(bool) for a in objects])
        features = segmenter.encode(VAL / image["file_name"]).features
        boxes = torch.tensor([[[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in objects)]])
        for value in overlap:
            model.config.prototype_weight = value
            masks = model(features=features, input_boxes=boxes).pred_masks[:, :, 0].detach()
            found = torch.nn.functional.interpolate(masks, truth.shape[1:], mode="bilinear")[0].numpy() > 0
            overlap[value] += ((found & truth).sum((1, 2)) / (found | truth).sum((1, 2))).tolist()
    model.config.prototype_weight = weight
    assert np.mean(overlap[weight]) > np.mean(overlap[0.0]) + 0.005
    with pytest.raises(InputError, match=r"input_boxes \[B, P, 4\]"):
        model(features=features, input_boxes=boxes[0])


def test_a_mask_that_is_given_says_more_than_a_prototype(segmenter):
    model = segmenter.model
    features = segmenter.encode(VAL / "images/028.jpg").features
    click = {"features": features, "input_points": torch.tensor([[[[85.0, 212.0]]]])}
    first = model(**click).pred_masks[:, :, 0]
    decoded = model.sam.decode(features.sam, input_points=click["input_points"], input_masks=first)
    again = model(**click, input_masks=first).pred_masks
    assert torch.equal(again, model.sam.select_masks(decoded, False).masks)


def test_three_masks_of_an_ambiguous_click_stay_the_decoders(segmenter):
    model = segmenter.model
    features = segmenter.encode(VAL / "images/028.jpg").features
    click = {"features": features, "input_points": torch.tensor([[[[85.0, 212.0]]]]), "multimask_output": True}
    plain = model(**click).pred_masks
    decoded = model.sam.decode(features.sam, input_points=click["input_points"])
    assert plain.shape[2] == 3 and torch.equal(plain, model.sam.select_masks(decoded, True).masks)
