"""A fused model gives the same outputs, in every composition."""

import copy

import pytest
import torch
from common import WORDS, picture, tiny_model, tiny_processor
from torch import nn

from ovsam.errors import InputError
from ovsam.inference.segmenter import Segmenter
from ovsam.modeling.fuse import fuse


@torch.no_grad()
def with_statistics(model: nn.Module) -> nn.Module:
    """Normalisations as training leaves them: a new one hardly changes its input."""
    torch.manual_seed(3)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.6, 1.6)
    return model


@pytest.mark.parametrize(
    ("composition", "sam", "clip", "folds"),
    [
        ("dual", "edgetam", "dual_encoder", True),
        ("clip", "sam2", "dual_encoder", True),
        ("dual", "sam2", "resnet", True),
        ("dual", "sam", "convnext", False),
        ("sam", "edgetam", "dual_encoder", True),
    ],
)
@torch.no_grad()
def test_outputs_stay_equal(composition, sam, clip, folds):
    model = with_statistics(tiny_model(composition, sam=sam, clip=clip))
    fused = copy.deepcopy(model)
    norms = sum(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    assert (fuse(fused) > 0) == folds
    assert sum(isinstance(part, nn.BatchNorm2d) for part in fused.modules()) < max(norms, 1)
    torch.manual_seed(0)
    pixels, boxes = torch.rand(1, 3, 128, 128), torch.tensor([[[10.0, 10, 60, 70], [40, 30, 120, 100]]])
    words = nn.functional.normalize(torch.randn(5, model.clip.embed_dim), dim=-1)
    for question in ({"input_boxes": boxes}, {"proposal_threshold": 0.0}):
        one, two = (each(pixel_values=pixels, text_embeds=words, **question) for each in (model, fused))
        for name in ("pred_masks", "logits", "class_embeds", "iou_scores"):
            expected = one[name]
            torch.testing.assert_close(two[name], expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_a_fused_model_cannot_be_trained_or_saved(tmp_path):
    model = tiny_model()
    fuse(model)
    with pytest.raises(InputError, match="cannot be saved"):
        model.save_pretrained(tmp_path)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert fuse(model) == 0


def test_a_fused_segmenter_finds_the_same():
    model = with_statistics(tiny_model())
    plain, fused = (Segmenter(copy.deepcopy(model), tiny_processor(), "tiny") for _ in range(2))
    boxes = [[10, 10, 60, 70], [40, 30, 120, 100]]
    one = plain.what(picture(), boxes=boxes, vocabulary=list(WORDS))
    two = fused.fuse().what(picture(), boxes=boxes, vocabulary=list(WORDS))
    assert one.labels == two.labels
    assert [each.score for each in one] == pytest.approx([each.score for each in two], abs=1e-4)
