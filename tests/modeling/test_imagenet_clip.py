"""The CLIP side made of an ImageNet classifier of timm: features, ConSE against a slow loop, checkpoints."""

import pytest
import timm
import torch
from torch.nn.functional import normalize
from transformers import PreTrainedConfig, PreTrainedModel

from ovsam.checkpoints import text_tower
from ovsam.checkpoints.compose import load_clip
from ovsam.errors import InputError
from ovsam.modeling.clip import CLIP_SIDES, ImageNetConfig, ImageNetSide, imagenet
from ovsam.modeling.clip.imagenet import conse, create_classifier, embed_classes, imagenet_names

N, D = 30, 16
TEXT = {"hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64}
KINDS = {"test_efficientnet": 160, "test_convnext": 160, "test_resnet": 160, "test_vit": 160, "test_vit3": 160}
kinds = pytest.mark.parametrize("architecture", KINDS)


def make_config(architecture="test_efficientnet"):
    size = KINDS[architecture]
    return ImageNetConfig(
        architecture=architecture, num_classes=N, top=10, text_config=TEXT, embed_dim=D, image_size=size
    )


def make_side(architecture="test_efficientnet"):
    torch.manual_seed(0)
    side = ImageNetSide(make_config(architecture)).eval()
    side.class_embeds.copy_(normalize(torch.randn(N, D), dim=-1))
    with torch.no_grad():  # random classifiers are almost indifferent, which would hide mistakes
        side.vision_model.get_classifier().weight.normal_(std=2.0)
    return side


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


@kinds
@torch.no_grad()
def test_shapes_are_as_described(architecture):
    side, size = make_side(architecture), KINDS[architecture]
    features = side.encode_image(torch.randn(2, 3, size, size))
    assert tuple(feature_map.shape[1] for feature_map in features.maps) == side.channels
    assert tuple(size // feature_map.shape[-1] for feature_map in features.maps) == side.strides
    boxes = torch.tensor([[[0.0, 0, size, size], [10, 20, 70, 90]]]).expand(2, 2, 4)
    regions, dense = side.pool(features, boxes=boxes), side.dense(features)
    assert regions.shape == (2, 2, D)
    assert dense.shape == (2, D, *features.pool_map.shape[-2:])
    torch.testing.assert_close(regions.norm(dim=-1), torch.ones(2, 2))
    torch.testing.assert_close(dense.norm(dim=1), torch.ones(dense[:, 0].shape))


@pytest.mark.parametrize("architecture", ["test_efficientnet", "test_convnext", "test_resnet"])
@torch.no_grad()
def test_the_whole_image_is_classified_as_timm_does(architecture):
    side, size = make_side(architecture), KINDS[architecture]
    image = torch.randn(2, 3, size, size)
    box = torch.tensor([[[0.0, 0, size, size]]]).expand(2, 1, 4)
    found = side.pool(side.encode_image(image), boxes=box)[:, 0]
    expected = slow_conse(side.vision_model(image), side.class_embeds, 10)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_regions_and_locations_equal_a_slow_loop():
    side = make_side()
    features = side.encode_image(torch.randn(1, 3, 160, 160))
    masks = torch.zeros(1, 2, 160, 160)
    masks[0, 0, 32:96, 64:128] = 1
    masks[0, 1, 0:64, 0:32] = 1
    dense = side.dense(features)[0]
    for y in range(5):
        for x in range(5):
            logits = side.vision_model.forward_head(features.pool_map[:, :, y : y + 1, x : x + 1])
            torch.testing.assert_close(dense[:, y, x][None], slow_conse(logits, side.class_embeds, 10))
    for region, (rows, columns) in enumerate(((slice(1, 3), slice(2, 4)), (slice(0, 2), slice(0, 1)))):
        mean = features.pool_map[:, :, rows, columns].mean((-1, -2), keepdim=True)
        expected = slow_conse(side.vision_model.forward_head(mean), side.class_embeds, 10)
        torch.testing.assert_close(side.pool(features, masks=masks)[:, region], expected, atol=1e-5, rtol=1e-4)


def test_parts_have_the_same_names():
    whole = make_side().state_dict()
    vision = ImageNetSide(make_config(), part="vision").state_dict()
    text = ImageNetSide(make_config(), part="text").state_dict()
    assert whole.keys() == vision.keys() | text.keys() and not vision.keys() & text.keys()
    assert "class_embeds" in vision


class EnclosingConfig(PreTrainedConfig):
    model_type = "enclosing_imagenet"
    clip_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        if isinstance(self.clip_config, dict):
            self.clip_config = ImageNetConfig(**self.clip_config)
        super().__post_init__(**kwargs)


class Enclosing(PreTrainedModel):
    config: EnclosingConfig

    def __init__(self, config):
        super().__init__(config)
        self.clip = CLIP_SIDES[config.clip_config.model_type](config.clip_config)
        self.post_init()


@pytest.mark.parametrize("architecture", ["test_efficientnet", "test_vit"])
@torch.no_grad()
def test_a_checkpoint_gives_the_same_embeddings(architecture, tmp_path):
    side = make_side(architecture)
    model = Enclosing(EnclosingConfig(clip_config=make_config(architecture)))
    model.clip.load_state_dict(side.state_dict())
    model.save_pretrained(tmp_path)
    loaded = Enclosing.from_pretrained(tmp_path).eval().clip
    image = torch.randn(1, 3, KINDS[architecture], KINDS[architecture])
    expected, found = side.dense(side.encode_image(image)), loaded.dense(loaded.encode_image(image))
    torch.testing.assert_close(found, expected)
    ids = torch.randint(1, 60, (3, 5))
    torch.testing.assert_close(loaded.encode_text(ids), side.encode_text(ids))


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
