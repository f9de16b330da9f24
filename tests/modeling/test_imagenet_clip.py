"""The CLIP side made of an ImageNet classifier of timm: features, ConSE against a slow loop, checkpoints."""

import pytest
import timm
import torch
from testers.clip_side import ClipSideTester
from torch.nn.functional import normalize
from transformers import BertConfig

from ovsam.checkpoints import text_tower
from ovsam.checkpoints.compose import load_clip
from ovsam.errors import InputError
from ovsam.modeling.clip import ImageNetConfig, ImageNetSide, imagenet
from ovsam.modeling.clip.imagenet import conse, create_classifier, embed_classes, imagenet_names

N, D = 30, 16
TEXT = {"hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64}
TEXT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZE = 160


class TestImageNet(ClipSideTester):
    checks_text_length = False  # the processor does
    bfloat16_cosine = 0.9  # which classes are the likeliest changes with the rounding
    architecture = "test_efficientnet"

    @classmethod
    def config(cls):
        sizes = {"num_classes": N, "top": 10, "embed_dim": D, "image_size": SIZE, "max_text_length": 12}
        return ImageNetConfig(architecture=cls.architecture, text_config=BertConfig(**TEXT), **sizes)

    @classmethod
    def stir(cls, side):
        """Random classifiers give nearly the same to every class, which would hide mistakes."""
        side.class_embeds.copy_(normalize(torch.randn(N, D), dim=-1))
        side.vision_model.get_classifier().weight.normal_(std=2.0)

    def test_parts_share_no_weight(self, side):
        vision, text = (ImageNetSide(self.config(), part=part).state_dict() for part in ("vision", "text"))
        assert side.state_dict().keys() == vision.keys() | text.keys() and not vision.keys() & text.keys()
        assert "class_embeds" in vision

    @torch.no_grad()
    def test_the_whole_image_is_classified_as_by_timm(self, side):
        image, box = torch.randn(2, 3, SIZE, SIZE), torch.tensor([[[0.0, 0, SIZE, SIZE]]]).expand(2, 1, 4)
        found = side.pool(side.encode_image(image), boxes=box)[:, 0]
        expected = slow_conse(side.vision_model(image), side.class_embeds, 10)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)

    @torch.no_grad()
    def test_regions_and_locations_equal_a_slow_loop(self, side):
        features, masks = side.encode_image(torch.randn(1, 3, SIZE, SIZE)), torch.zeros(1, 2, SIZE, SIZE)
        assert features.maps[-1] is features.pool_map  # the map that the classifier pools
        masks[0, 0, 32:96, 64:128] = 1
        masks[0, 1, 0:64, 0:32] = 1
        dense = side.dense(features)[0]
        for y, x in torch.cartesian_prod(torch.arange(5), torch.arange(5)).tolist():
            logits = side.vision_model.forward_head(features.pool_map[:, :, y : y + 1, x : x + 1])
            torch.testing.assert_close(dense[:, y, x][None], slow_conse(logits, side.class_embeds, 10))
        for region, (rows, columns) in enumerate(((slice(1, 3), slice(2, 4)), (slice(0, 2), slice(0, 1)))):
            mean = features.pool_map[:, :, rows, columns].mean((-1, -2), keepdim=True)
            expected = slow_conse(side.vision_model.forward_head(mean), side.class_embeds, 10)
            torch.testing.assert_close(side.pool(features, masks=masks)[:, region], expected, atol=1e-5, rtol=1e-4)


class TestImageNetConvNext(TestImageNet):
    architecture = "test_convnext"


class TestImageNetResNet(TestImageNet):
    architecture = "test_resnet"


class TestImageNetVit(TestImageNet):
    architecture = "test_vit"
    # A transformer classifies tokens, not the mean of a map.
    test_the_whole_image_is_classified_as_by_timm = test_regions_and_locations_equal_a_slow_loop = None


class TestImageNetVit3(TestImageNetVit):
    architecture = "test_vit3"


def slow_conse(logits, class_embeds, top):
    rows = []
    for row in logits.double().softmax(-1).tolist():
        total = torch.zeros(class_embeds.shape[1], dtype=torch.float64)
        for name in sorted(range(len(row)), key=lambda name: -row[name])[:top]:
            total += row[name] * class_embeds[name].double()
        rows.append(total / total.norm())
    return torch.stack(rows).float()


@pytest.mark.parametrize("top", [1, 10, N])
def test_conse_equals_a_slow_loop(top):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, N, generator=generator) * 3
    class_embeds = normalize(torch.randn(N, D, generator=generator), dim=-1)
    torch.testing.assert_close(conse(logits, class_embeds, top), slow_conse(logits, class_embeds, top))


def test_names_of_imagenet():
    names = imagenet_names()
    assert len(names) == 1000 and names[0] == ["tench", "Tinca tinca"] and names[1][0] == "goldfish"
    with pytest.raises(InputError, match="7 classes"):
        imagenet_names(7)


def test_class_embeds_are_means_over_synonyms():
    table = {"a": torch.tensor([1.0, 0]), "b": torch.tensor([0.0, 1]), "c": torch.tensor([0.0, -1])}
    found = embed_classes([["a", "b"], ["c"]], lambda texts: torch.stack([table[text] for text in texts]))
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5], [0, -1]]))


def test_composing_with_a_classifier_of_timm(monkeypatch):
    def offline(name, num_classes, image_size, pretrained=False):
        return create_classifier(name, num_classes, image_size)

    def embed_texts(texts):
        return normalize(torch.randn(len(texts), 384, generator=torch.Generator().manual_seed(0)), dim=-1)

    monkeypatch.setattr(imagenet, "create_classifier", offline)
    monkeypatch.setattr(text_tower, "embed_texts", embed_texts)
    part = load_clip("imagenet:test_efficientnet.r160_in1k")
    assert part.config.num_classes == 1000 and part.config.model_type == "ovsam_imagenet"
    side = ImageNetSide(part.config).eval()
    side.load_state_dict(part.state)  # every weight is there
    assert side.class_embeds.shape == (1000, 384) and (part.folder / "tokenizer.json").is_file()


def test_an_unknown_classifier_is_an_error():
    with pytest.raises(InputError, match="no model 'nothing'"):
        ImageNetSide(ImageNetConfig(architecture="nothing", text_config=TEXT))
    assert timm.is_model("test_efficientnet")
