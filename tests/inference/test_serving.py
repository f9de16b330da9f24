"""The model behind labelling tools, called as their own libraries call it."""

from types import SimpleNamespace

import numpy as np
import pytest
from label_stub import FakeSegmenter
from PIL import Image

from ovsam.errors import InputError
from ovsam.inference.serving import cvat
from ovsam.results.results import Results


class OneImage(FakeSegmenter):
    """The stand-in, asked about one image as `Segmenter.where` is."""

    def where(self, image, words, threshold=None):
        found = self._find(image, np.asarray(image).mean(), words)
        return Results(found.instances, found.size).filter(score=threshold or 0)


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8))


def test_cvat_gets_masks_and_polygons(picture, monkeypatch):
    sdk = pytest.importorskip("cvat_sdk.auto_annotation")
    masks = pytest.importorskip("cvat_sdk.masks")
    monkeypatch.setattr(cvat, "load", lambda model, device: OneImage())
    function = cvat.create("dog, red ball")
    assert isinstance(function.spec, sdk.DetectionFunctionSpec)
    assert [(label.name, label.id) for label in function.spec.labels] == [("dog", 0), ("red ball", 1)]
    expected = function.segmenter.where(picture, function.words)
    context = SimpleNamespace(frame_name="a.png", conf_threshold=None, conv_mask_to_poly=False)
    shapes = function.detect(context, picture)
    assert [(shape.type.value, shape.label_id, shape.frame) for shape in shapes] == [("mask", 0, 0), ("mask", 1, 0)]
    for shape, mask in zip(shapes, expected.masks, strict=True):
        np.testing.assert_array_equal(masks.decode_mask(shape.points, image_width=48, image_height=40), mask)
    context.conv_mask_to_poly = True
    shapes = function.detect(context, picture)
    assert {shape.type.value for shape in shapes} == {"polygon"} and min(shapes[0].points[1::2]) == 2
    context.conf_threshold = expected.scores.min() + 1e-4
    assert len(function.detect(context, picture)) == 1
    assert len(cvat.create("coco").words.labels) == 80
    with pytest.raises(InputError, match="There are no words"):
        cvat.create(" ,")
