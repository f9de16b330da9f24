"""CLIP sides: equal to the models they hold, also after save_pretrained -> from_pretrained inside another model."""

import copy
import re

import open_clip
import pytest
import torch
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed
from torch.nn.functional import normalize
from transformers import (
    CLIPConfig,
    Owlv2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2Config,
    Siglip2ImageProcessor,
    SiglipConfig,
)

from ovsam.errors import InputError
from ovsam.modeling.clip import CLIP_SIDES, OpenClipConfig, OpenClipSide
from ovsam.modeling.clip.base import boxes_to_masks, map_blocks, mask_pool, value_path
from ovsam.modeling.clip.open_clip import attention_pool
from ovsam.ops.boxes import masks_to_boxes

TEXT = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
SIGLIP_TEXT = TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
HF_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
HF_TEXT = HF_TOWER | {"vocab_size": 64, "max_position_embeddings": 12, "bos_token_id": 62, "eos_token_id": 63}
HF_VISION = HF_TOWER | {"image_size": 32, "patch_size": 8}
HF_NAFLEX = HF_TOWER | {"num_patches": 16, "patch_size": 8}


def open_clip_config(vision_cfg, text_cfg=TEXT, **more):
    return OpenClipConfig(model_cfg={"embed_dim": 24, "vision_cfg": vision_cfg, "text_cfg": text_cfg, **more})


def timm_config(name, size, pool="", proj="linear", text_cfg=TEXT, **more):
    tower = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": size}
    return open_clip_config(tower, text_cfg, **more)


CONFIGS = {
    "vit": open_clip_config({"image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "head_width": 16}),
    "avg_vit": open_clip_config(
        {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16, "pool_type": "avg"}
    ),
    "resnet": open_clip_config({"image_size": 64, "layers": [1, 1, 2, 1], "width": 8, "head_width": 64}),
    "convnext": timm_config("test_convnext", 64),
    "timm_vit": timm_config("test_vit", 160, pool="token"),
    "timm_siglip": timm_config(
        "test_vit", 160, pool="map", proj=None, text_cfg=SIGLIP_TEXT, init_logit_scale=2.3, init_logit_bias=-10.0
    ),
    "timm_rope": timm_config("eva02_tiny_patch14_224", 224, pool="token"),
    "clip": CLIPConfig(text_config=HF_TEXT, vision_config=HF_VISION, projection_dim=24),
    "siglip": SiglipConfig(text_config=HF_TEXT | {"projection_size": 32}, vision_config=HF_VISION),
    "siglip2": Siglip2Config(text_config=HF_TEXT | {"projection_size": 32}, vision_config=HF_NAFLEX),
    "owlv2": Owlv2Config(text_config=HF_TEXT, vision_config=HF_VISION, projection_dim=32),
}
CONFIG_CLASSES = {config.model_type: type(config) for config in CONFIGS.values()}
families = pytest.mark.parametrize("family", CONFIGS)
TRANSFORMERS = ("clip", "siglip", "siglip2", "owlv2")
open_clip_families = pytest.mark.parametrize("family", [name for name in CONFIGS if name not in TRANSFORMERS])


def make_side(family):
    torch.manual_seed(0)
    side = CLIP_SIDES[CONFIGS[family].model_type](copy.deepcopy(CONFIGS[family])).eval()
    with torch.no_grad():  # the towers start with many zeros (biases, layer scales), which would hide mistakes
        for parameter in side.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return side


def make_inputs(side):
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.randn(2, 3, side.image_size, side.image_size, generator=generator)
    input_ids = torch.randint(1, 62, (3, side.max_text_length), generator=generator)
    input_ids[:, 0] = 62
    for row, end in enumerate((4, 7, 11)):
        input_ids[row, end:] = 0
        input_ids[row, end] = 63
    masks = torch.zeros(2, 2, 16, 16)
    masks[:, 0, 2:9, 4:16] = 1
    masks[:, 1, 5, 5] = 0.8
    return pixel_values, input_ids, masks


@torch.no_grad()
def run(side):
    pixel_values, input_ids, masks = make_inputs(side)
    features = side.encode_image(pixel_values.to(next(side.parameters()).dtype))
    return {
        "text": side.encode_text(input_ids),
        "regions": side.pool(features, masks=masks),
        "pool_map": features.pool_map,
        **{f"maps.{index}": feature_map for index, feature_map in enumerate(features.maps)},
    }


class EnclosingConfig(PreTrainedConfig):
    model_type = "enclosing"
    clip_config: dict | PreTrainedConfig | None = None
    part: str = "all"

    def __post_init__(self, **kwargs):
        if isinstance(self.clip_config, dict):
            self.clip_config = CONFIG_CLASSES[self.clip_config["model_type"]](**self.clip_config)
        super().__post_init__(**kwargs)


class Enclosing(PreTrainedModel):
    config: EnclosingConfig

    def __init__(self, config):
        super().__init__(config)
        self.clip = CLIP_SIDES[config.clip_config.model_type](config.clip_config, part=config.part)
        self.adapter = torch.nn.Linear(3, 3)
        self.post_init()


@pytest.fixture
def saved(family, tmp_path):
    """A side with changed weights, and the folder of a model around it."""
    side = make_side(family)
    model = Enclosing(EnclosingConfig(clip_config=copy.deepcopy(CONFIGS[family])))
    model.clip.load_state_dict(side.state_dict())
    model.save_pretrained(tmp_path)
    return side, tmp_path


# The contract


@families
def test_shapes_are_as_described(family):
    side = make_side(family)
    found = run(side)
    maps = [found[f"maps.{index}"] for index in range(len(side.channels))]
    assert tuple(feature_map.shape[1] for feature_map in maps) == side.channels
    assert tuple(side.image_size // feature_map.shape[-1] for feature_map in maps) == side.strides
    assert found["text"].shape == (3, side.embed_dim) and found["regions"].shape == (2, 2, side.embed_dim)
    for name in ("text", "regions"):
        torch.testing.assert_close(found[name].norm(dim=-1), torch.ones(found[name].shape[:-1]))
    assert len(side.image_mean) == len(side.image_std) == 3


def test_strides_of_pyramids_and_plain_transformers():
    assert make_side("convnext").strides == make_side("resnet").strides == (4, 8, 16, 32)
    assert make_side("vit").strides == make_side("clip").strides == (8, 8, 8, 8)
    assert [map_blocks(depth) for depth in (2, 4, 12, 24)] == [[0, 1], [0, 1, 2, 3], [2, 5, 8, 11], [5, 11, 17, 23]]


@families
def test_padding_after_a_phrase_does_not_count_or_is_required(family):
    side = make_side(family)
    input_ids = make_inputs(side)[1][:1]
    with torch.no_grad():
        whole = side.encode_text(input_ids)
        if side.text_padding == "max_length":
            assert "siglip" in family
            with pytest.raises(InputError, match="padded to 12 tokens, not 5"):
                side.encode_text(input_ids[:, :5])
        else:
            assert side.text_padding == "longest" and "siglip" not in family
            torch.testing.assert_close(side.encode_text(input_ids[:, :5]), whole, rtol=0, atol=1e-6)


@families
def test_a_phrase_over_the_limit_is_an_error(family):
    side = make_side(family)
    with pytest.raises(ValueError, match="12"):
        side.encode_text(torch.ones(1, 13, dtype=torch.long))


@pytest.mark.parametrize("family", ["vit", "resnet", "convnext", "timm_siglip", "clip", "siglip", "siglip2", "owlv2"])
def test_gradients_reach_the_image_through_maps_and_regions(family):
    side = make_side(family)
    pixel_values, _, masks = make_inputs(side)
    features = side.encode_image(pixel_values.requires_grad_())
    for output in (*features.maps, side.pool(features, masks=masks)[..., 0]):
        (gradient,) = torch.autograd.grad(output.sum(), pixel_values, retain_graph=True)
        assert gradient.abs().max() > 0


# Equal to the model inside


@open_clip_families
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_text_equals_open_clips_own(family, quick_gelu):
    model_cfg = copy.deepcopy(CONFIGS[family].model_cfg) | {"quick_gelu": quick_gelu}
    custom = model_cfg["text_cfg"].get("no_causal_mask")  # as in open_clip's own configurations
    own = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**copy.deepcopy(model_cfg)).eval()
    side = OpenClipSide(OpenClipConfig(model_cfg=model_cfg)).eval()
    side.model.load_state_dict(convert_to_custom_text_state_dict(own.state_dict()))
    input_ids = make_inputs(side)[1]
    with torch.no_grad():
        expected = own.encode_text(input_ids, normalize=True)
        torch.testing.assert_close(side.encode_text(input_ids), expected, rtol=0, atol=1e-6)


def own_open_clip(family, **more):
    """open_clip's own model, of the class its factory would take."""
    model_cfg = copy.deepcopy(CONFIGS[family].model_cfg)
    model_cfg["vision_cfg"] |= more
    custom = model_cfg["text_cfg"].get("no_causal_mask")
    return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**model_cfg).eval()


def own_weights(side):
    """The weights of a side in open_clip's own layout, for the classes that keep the text tower at the top."""
    weights = side.model.state_dict()
    if side.config.model_cfg["text_cfg"].get("no_causal_mask"):
        return weights
    return {name.removeprefix("text."): weight for name, weight in weights.items()}


@open_clip_families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_equals_open_clips_own_after_save_and_load(family, saved, dtype):
    """The image's and the words' embeddings, and the maps. In bfloat16 too, save that rotary tables stay in float32
    here, and that open_clip rounds them."""
    side, folder = saved
    tolerance = 0.03 if family == "timm_rope" and dtype == torch.bfloat16 else 1e-6
    own = own_open_clip(family)
    own.load_state_dict(own_weights(side))
    own.to(dtype)
    loaded = Enclosing.from_pretrained(folder, dtype=dtype).clip
    pixel_values, input_ids, _ = make_inputs(side)
    pixel_values = pixel_values.to(dtype)
    with torch.no_grad():
        pairs = {
            "image": (loaded.model.encode_image(pixel_values, normalize=True), own.encode_image(pixel_values, True)),
            "text": (loaded.encode_text(input_ids), own.encode_text(input_ids, True)),
            "last map": (
                loaded.encode_image(pixel_values).maps[-1],
                own.visual.forward_intermediates(pixel_values, stop_early=True)["image_intermediates"][-1],
            ),
        }
    for name, (found, expected) in pairs.items():
        scale = expected.abs().max()
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2"])
def test_text_equals_transformers_own(family):
    side = make_side(family)
    input_ids = make_inputs(side)[1]
    with torch.no_grad():
        expected = normalize(side.model.get_text_features(input_ids).pooler_output, dim=-1)
        torch.testing.assert_close(side.encode_text(input_ids), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["resnet", "convnext", "avg_vit"])
def test_the_whole_image_pools_to_the_towers_own_embedding(family):
    side = make_side(family)
    pixel_values, _, _ = make_inputs(side)
    with torch.no_grad():
        features = side.encode_image(pixel_values)
        expected = normalize(side.model.encode_image(pixel_values), dim=-1)  # of the tower, run whole
        everything = torch.ones(2, 1, 8, 8)
        box = torch.tensor([[[0.0, 0.0, side.image_size, side.image_size]]]).repeat(2, 1, 1)
        for pooled in (side.pool(features, masks=everything), side.pool(features, boxes=box)):
            torch.testing.assert_close(pooled[:, 0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["resnet", "convnext"])
def test_pyramids_take_images_of_any_size(family):
    side = make_side(family)
    pixel_values = torch.randn(1, 3, 96, 160)
    features = side.encode_image(pixel_values)
    assert [tuple(m.shape[-2:]) for m in features.maps] == [(24, 40), (12, 20), (6, 10), (3, 5)]
    right = torch.zeros(1, 1, 96, 160)
    right[..., 80:] = 1
    box = torch.tensor([[[80.0, 0.0, 160.0, 96.0]]])
    torch.testing.assert_close(side.pool(features, masks=right), side.pool(features, boxes=box))


def test_maps_of_the_resnet_are_its_stages():
    side = make_side("resnet")
    visual = side.model.visual
    pixel_values = make_inputs(side)[0]
    with torch.no_grad():
        state = visual.stem(pixel_values)
        for stage, found in zip(
            (visual.layer1, visual.layer2, visual.layer3, visual.layer4),
            side.encode_image(pixel_values).maps,
            strict=True,
        ):
            state = stage(state)
            torch.testing.assert_close(found, state, rtol=0, atol=1e-6)


def test_the_attention_pool_is_exact():
    pool = make_side("resnet").model.visual.attnpool
    feature_map = torch.randn(5, pool.k_proj.in_features, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(attention_pool(pool, feature_map), pool(feature_map), rtol=1e-5, atol=1e-5)


def value_of_open_clip(visual, tokens):
    """The MaskCLIP value path of a last block, written out with its weights."""
    block = visual.transformer.resblocks[-1]
    width = tokens.shape[-1]
    value = block.ln_1(tokens) @ block.attn.in_proj_weight[2 * width :].T + block.attn.in_proj_bias[2 * width :]
    tokens = tokens + block.attn.out_proj(value)
    tokens = tokens + block.mlp(block.ln_2(tokens))
    return visual.ln_post(tokens) @ visual.proj


def value_of_timm(visual, tokens):
    block = visual.trunk.blocks[-1]
    width = tokens.shape[-1]
    value = block.norm1(tokens) @ block.attn.qkv.weight[2 * width :].T + block.attn.qkv.bias[2 * width :]
    tokens = tokens + block.ls1(block.attn.proj(value))
    tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    return visual.head(visual.trunk.norm(tokens))


def value_of_timm_siglip(visual, tokens):
    head = visual.trunk.attn_pool
    tokens = visual.trunk.norm(tokens)
    width = tokens.shape[-1]
    tokens = head.proj(tokens @ head.kv.weight[width:].T + head.kv.bias[width:])
    tokens = tokens + head.mlp(head.norm(tokens))
    return visual.head(visual.trunk.head(tokens))


def value_of_clip(model, tokens):
    block = model.vision_model.encoder.layers[-1]
    tokens = tokens + block.self_attn.out_proj(block.self_attn.v_proj(block.layer_norm1(tokens)))
    tokens = tokens + block.mlp(block.layer_norm2(tokens))
    return model.visual_projection(model.vision_model.post_layernorm(tokens))


def value_of_siglip(model, tokens):
    head = model.vision_model.head
    tokens = model.vision_model.post_layernorm(tokens)
    width = tokens.shape[-1]
    value = tokens @ head.attention.in_proj_weight[2 * width :].T + head.attention.in_proj_bias[2 * width :]
    tokens = head.attention.out_proj(value)
    return tokens + head.mlp(head.layernorm(tokens))


@pytest.mark.parametrize(
    ("family", "from_map", "tower", "value"),
    [
        ("vit", -2, lambda side: side.model.visual, value_of_open_clip),
        ("clip", -2, lambda side: side.model, value_of_clip),
        ("siglip", -1, lambda side: side.model, value_of_siglip),
    ],
)
def test_patches_are_embedded_by_the_value_path(family, from_map, tower, value):
    side = make_side(family)
    with torch.no_grad():
        features = side.encode_image(make_inputs(side)[0])
        tokens = features.maps[from_map].flatten(2).mT
        expected = value(tower(side), tokens).mT.reshape(features.pool_map.shape)
    torch.testing.assert_close(features.pool_map, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "block", "value"), [("timm_vit", 4, value_of_timm), ("timm_siglip", 5, value_of_timm_siglip)]
)
def test_patches_of_a_timm_transformer_are_embedded_by_the_value_path(family, block, value):
    side = make_side(family)
    pixel_values = make_inputs(side)[0]
    trunk = side.model.visual.trunk
    with torch.no_grad():
        (tokens,) = trunk.forward_intermediates(pixel_values, [block], output_fmt="NLC", intermediates_only=True)
        found = side.encode_image(pixel_values).pool_map
        expected = value(side.model.visual, tokens).mT.reshape(found.shape)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@families
def test_dense_is_what_each_location_pools_to(family):
    side = make_side(family)
    with torch.no_grad():
        features = side.encode_image(make_inputs(side)[0])
        dense = side.dense(features)
        assert dense.shape == (2, side.embed_dim, *features.pool_map.shape[-2:])
        torch.testing.assert_close(dense.norm(dim=1), torch.ones(2, *dense.shape[-2:]))
        if family == "resnet":  # regions go through the whole pool there; places take MaskCLIP's way, by 1 x 1 kernels
            pool = side.model.visual.attnpool
            for step in (pool.v_proj, pool.c_proj):
                weight = step.weight[..., None, None]
                features.pool_map = torch.nn.functional.conv2d(features.pool_map, weight, step.bias)
            expected = normalize(features.pool_map, dim=1)
        else:
            cells = torch.eye(dense[0, 0].numel()).unflatten(1, dense.shape[-2:]).expand(2, -1, -1, -1)
            expected = side.pool(features, masks=cells).mT.unflatten(2, dense.shape[-2:])
    torch.testing.assert_close(dense, expected, rtol=0, atol=1e-6)


# Words' logits, as the tower was trained


@pytest.mark.parametrize("family", [name for name in CONFIGS if name != "owlv2"])  # see test_owlv2.py
def test_logits_are_those_the_tower_was_trained_with(family):
    side = make_side(family)
    assert side.softmax == (family not in ("timm_siglip", "siglip", "siglip2"))
    pixel_values, input_ids, _ = make_inputs(side)
    with torch.no_grad():
        if family == "siglip2":
            found = Siglip2ImageProcessor(patch_size=8, max_num_patches=16, do_rescale=False, do_normalize=False)(
                list(pixel_values), return_tensors="pt"
            )
            logits = side.model(input_ids=input_ids, **found).logits_per_image
            images = normalize(side.model.get_image_features(**found).pooler_output, dim=-1)
        elif family in TRANSFORMERS:
            logits = side.model(input_ids=input_ids, pixel_values=pixel_values).logits_per_image
            images = normalize(side.model.get_image_features(pixel_values).pooler_output, dim=-1)
        else:
            images = side.model.encode_image(pixel_values, normalize=True)
            logits = side.model.get_logits(pixel_values, input_ids)[0]
        found = (images @ side.encode_text(input_ids).T + side.logit_shift) * side.logit_scale
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["clip", "siglip", "owlv2"])
def test_the_last_map_is_the_last_hidden_state(family):
    side = make_side(family)
    pixel_values = make_inputs(side)[0]
    with torch.no_grad():
        found = side.encode_image(pixel_values).maps[-1].flatten(2).mT
        vision = side.model.owlv2.vision_model if family == "owlv2" else side.model.vision_model
        embedded = vision.embeddings(pixel_values)
        if family != "siglip":
            embedded = getattr(vision, "pre_layrnorm" if family == "clip" else "pre_layernorm")(embedded)
        expected = vision.encoder(inputs_embeds=embedded).last_hidden_state[:, -16:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# Sizes other than the one the tower was trained at


@pytest.mark.parametrize("size", [(48, 48), (24, 24), (32, 64)])
@pytest.mark.parametrize("family", ["vit", "avg_vit"])
def test_a_vit_of_another_size_is_the_one_open_clip_would_load(family, size):
    side = make_side(family)
    own = own_open_clip(family, image_size=size)
    weights = own_weights(side)
    resize_pos_embed(weights, own)  # as open_clip does while it loads
    own.load_state_dict(weights)
    pixel_values = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = own.visual.forward_intermediates(pixel_values)["image_intermediates"]
        found = side.encode_image(pixel_values)
    for mine, theirs in zip(found.maps, [expected[block] for block in side.tower.blocks], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert found.pool_map.shape[-2:] == (size[0] // 8, size[1] // 8)


@pytest.mark.parametrize(
    ("family", "size"),
    [
        ("timm_vit", (192, 192)),
        ("timm_siglip", (96, 128)),
        ("timm_siglip", (192, 192)),
        ("timm_rope", (252, 252)),
        ("timm_rope", (112, 140)),
    ],
)
def test_a_timm_transformer_of_another_size_is_the_one_open_clip_would_set(family, size):
    side = make_side(family)
    own = own_open_clip(family)
    own.load_state_dict(own_weights(side))
    own.visual.set_input_size(size)  # what open_clip's factory does after loading
    pixel_values = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected = own.visual.forward_intermediates(pixel_values)["image_intermediates"]
        found = side.encode_image(pixel_values).maps
        for mine, theirs in zip(found, [expected[block] for block in side.tower.blocks], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        whole = own.encode_image(pixel_values)
        torch.testing.assert_close(side.model.encode_image(pixel_values), whole, rtol=1e-5, atol=1e-5)


def test_what_no_whole_patch_covers_is_dropped_as_the_tower_does():
    """As in SigLIP's so400m-patch14-384, whose 27 patches cover 378 pixels."""
    side = make_side("timm_siglip")
    pixel_values = torch.randn(1, 3, 167, 160)
    with torch.no_grad():
        found, expected = side.encode_image(pixel_values), side.encode_image(pixel_values[..., :160, :])
    torch.testing.assert_close(found.pool_map, expected.pool_map, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_transformers_sides_take_images_of_any_size(family):
    side = make_side(family)
    pixel_values = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        found = side.encode_image(pixel_values)
        own = side.model.vision_model(pixel_values, interpolate_pos_encoding=True, output_hidden_states=True)
    assert found.pool_map.shape == (1, side.embed_dim, 6, 8)
    expected = own.hidden_states[-1][:, -48:].mT.unflatten(2, (6, 8))
    torch.testing.assert_close(found.maps[-1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_siglip2_reads_a_grid_of_patches_as_its_own_processor_cuts_them(size):
    side = make_side("siglip2")
    assert side.image_size == 32 and side.strides[0] == 8
    image = torch.rand(3, *size)
    patches = Siglip2ImageProcessor(patch_size=8, max_num_patches=16, do_rescale=False)(image, return_tensors="pt")
    assert patches["spatial_shapes"].tolist() == [[size[0] // 8, size[1] // 8]]  # of this size already
    mean, std = (torch.tensor(values)[:, None, None] for values in (side.image_mean, side.image_std))
    with torch.no_grad():
        own = side.model.vision_model(**patches)
        found = side.encode_image(((image - mean) / std)[None])
        tokens = side.model.vision_model.post_layernorm(found.maps[-1].flatten(2).mT)
        count = tokens.shape[1]
        torch.testing.assert_close(tokens, own.last_hidden_state[:, :count], rtol=1e-5, atol=1e-5)
        whole = side.model.vision_model.head(tokens)
        torch.testing.assert_close(whole, own.pooler_output, rtol=1e-5, atol=1e-5)


def test_the_resnet_pools_on_its_own_grid_at_any_size():
    """A region of the size the tower was trained at is pooled alike, wherever it lies in a larger image."""
    side = make_side("resnet")
    pixel_values = torch.randn(1, 3, 96, 160)
    box = torch.tensor([[[64.0, 32.0, 128.0, 96.0]]])
    with torch.no_grad():
        features = side.encode_image(pixel_values)
        cells = features.pool_map[..., 1:3, 2:4]
        expected = normalize(side.model.visual.attnpool(cells), dim=-1)
        torch.testing.assert_close(side.pool(features, boxes=box)[:, 0], expected, rtol=0, atol=1e-5)


def test_a_swin_of_another_size_is_refused():
    with torch.device("meta"):
        side = OpenClipSide(timm_config("swin_tiny_patch4_window7_224", 224, pool="avg"), part="vision")
        with pytest.raises(InputError, match="224 x 224 pixels only, not 256 x 256"):
            side.encode_image(torch.empty(1, 3, 256, 256))


# The trap: buffers that are not saved are uninitialised memory after from_pretrained


@families
def test_outputs_survive_save_and_load(family, saved):
    side, folder = saved
    loaded, report = Enclosing.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    found = run(loaded.clip)
    for name, expected in run(side).items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6, msg=name)


@families
@pytest.mark.parametrize("part", ["vision", "text"])
def test_a_part_loads_from_the_whole_and_gives_the_same(family, part, saved):
    side, folder = saved
    config = EnclosingConfig.from_pretrained(folder, part=part)
    loaded, report = Enclosing.from_pretrained(folder, config=config, output_loading_info=True)
    assert not report["missing_keys"]
    other = r"\b(text|text_model)\." if part == "vision" else r"\b(visual|vision_model)\."
    assert any(re.search(other, name) for name in Enclosing.from_pretrained(folder).state_dict())
    assert not any(re.search(other, name) for name in loaded.state_dict())
    pixel_values, input_ids, masks = make_inputs(side)
    with torch.no_grad():
        if part == "text":
            found, expected = loaded.clip.encode_text(input_ids), side.encode_text(input_ids)
        else:
            found = loaded.clip.pool(loaded.clip.encode_image(pixel_values), masks=masks)
            expected = side.pool(side.encode_image(pixel_values), masks=masks)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@families
def test_a_load_in_bfloat16_works(family, saved):
    side, folder = saved
    loaded = Enclosing.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    found = run(loaded.clip)
    expected = run(side)
    for name in ("text", "regions"):
        assert found[name].dtype == torch.bfloat16
        assert (found[name].float() * expected[name]).sum(-1).min() > 0.99, name


@open_clip_families
def test_weights_the_checkpoint_lacks_are_drawn_anew(family):
    side = make_side(family)
    weights = side.state_dict()
    kept = {name: weight for index, (name, weight) in enumerate(weights.items()) if index % 3}
    loaded, report = OpenClipSide.from_pretrained(
        None, config=side.config, state_dict=dict(kept), output_loading_info=True
    )
    assert set(report["missing_keys"]) == weights.keys() - kept.keys()
    for name, weight in loaded.state_dict().items():
        if name in kept:
            assert torch.equal(weight, kept[name]), name
        else:
            assert weight.float().abs().max() < 10, name  # false for NaN too


def test_a_side_built_from_its_config_keeps_the_towers_own_init():
    torch.manual_seed(0)
    own = open_clip.CustomTextCLIP(**copy.deepcopy(CONFIGS["vit"].model_cfg)).state_dict()
    torch.manual_seed(0)
    side = OpenClipSide(CONFIGS["vit"]).model.state_dict()
    assert all(torch.equal(side[name], weight) for name, weight in own.items())


@pytest.mark.parametrize("model_cfg", [{"multimodal_cfg": {}}, {"text_cfg": {"hf_model_name": "roberta-base"}}])
def test_towers_that_need_other_files_are_refused(model_cfg):
    config = open_clip_config(CONFIGS["vit"].model_cfg["vision_cfg"])
    config.model_cfg.update(model_cfg)
    with pytest.raises(InputError, match="not supported"):
        OpenClipSide(config)


def test_the_config_survives_its_json(tmp_path):
    config = OpenClipConfig(model_cfg=CONFIGS["resnet"].model_cfg, image_size=128, image_mean=(0.1, 0.2, 0.3))
    config.save_pretrained(tmp_path)
    loaded = OpenClipConfig.from_pretrained(tmp_path)
    assert loaded.model_cfg == config.model_cfg and loaded.image_size == 128
    assert tuple(loaded.image_mean) == (0.1, 0.2, 0.3) and OpenClipConfig().image_size == 224


# Regions


def test_mask_pool_weighs_by_area():
    feature_map = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    masks = torch.zeros(1, 3, 4, 4)
    masks[0, 0, :, :2] = 1  # the left half
    masks[0, 1, 0, 0] = 0.5  # a quarter of one cell
    masks[0, 1, 3, 2:] = 0.5  # and half of another
    found = mask_pool(feature_map, masks)
    torch.testing.assert_close(found, torch.tensor([[[2.0], [3.0], [0.0]]]))


def test_boxes_and_masks_convert():
    boxes = torch.tensor([[[8.0, 0.0, 24.0, 16.0], [4.0, 6.0, 12.0, 8.0], [3.0, 3.0, 3.0, 3.0]]])
    masks = boxes_to_masks(boxes, (3, 4), 8)
    expected = torch.zeros(1, 3, 3, 4)
    expected[0, 0, :2, 1:3] = 1
    expected[0, 1, 0, 0] = expected[0, 1, 0, 1] = 4 * 2 / 64
    torch.testing.assert_close(masks, expected)
    back = masks_to_boxes(masks > 0.5) * 8
    assert back.tolist() == [[[8, 0, 24, 16], [0, 0, 0, 0], [0, 0, 0, 0]]]


def test_a_mask_counts_as_its_box_in_the_resnet():
    side = make_side("resnet")
    features = side.encode_image(make_inputs(side)[0])
    masks = torch.zeros(2, 2, 64, 64)
    masks[:, 0, 8:40, 16:64] = 1
    boxes = torch.tensor([[[16.0, 8.0, 64.0, 40.0], [0.0, 0.0, 0.0, 0.0]]]).repeat(2, 1, 1)
    torch.testing.assert_close(side.pool(features, masks=masks), side.pool(features, boxes=boxes))


def test_value_path_keeps_places_apart_and_in_order():
    feature_map = torch.randn(2, 3, 4, 5)
    weight = torch.randn(3, 7)
    found = value_path(lambda tokens: tokens.cumsum(1)[:, -1] @ weight, feature_map)
    torch.testing.assert_close(found, torch.einsum("bchw,cd->bdhw", feature_map, weight))
