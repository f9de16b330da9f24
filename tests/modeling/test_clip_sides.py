"""The CLIP sides: each family against the model that it holds, at tiny random size."""

import copy

import open_clip
import pytest
import torch
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed
from testers.clip_side import ClipSideTester, Enclosing, make_inputs
from torch.nn.functional import conv2d, normalize
from transformers import BertConfig, CLIPConfig, Siglip2Config, Siglip2ImageProcessor, SiglipConfig

from ovsam.errors import InputError
from ovsam.modeling.clip import DualEncoderConfig, OpenClipConfig, OpenClipSide
from ovsam.modeling.clip.base import boxes_to_masks, map_blocks, mask_pool, value_path
from ovsam.modeling.clip.open_clip import attention_pool
from ovsam.ops.boxes import masks_to_boxes

TEXT = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
SIGLIP_TEXT = TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
HF_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
HF_TEXT = HF_TOWER | {"vocab_size": 64, "max_position_embeddings": 12, "bos_token_id": 62, "eos_token_id": 63}
HF_VISION = HF_TOWER | {"image_size": 32, "patch_size": 8}
VIT = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16}


def timm_tower(name, size, pool="", proj="linear"):
    return {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": size}


class TestDualEncoder(ClipSideTester):
    checks_text_length = False  # the processor does

    @classmethod
    def config(cls):
        tower = HF_TOWER | {"vocab_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        sizes = {"embed_dim": 32, "image_size": 64, "max_text_length": 12}
        return DualEncoderConfig(architecture="test_efficientnet", text_config=BertConfig(**tower), **sizes)


# ------------------------------------------------------------------------------------------------------- open_clip


class OpenClipTester(ClipSideTester):
    """Adds the comparison with open_clip itself: embeddings, maps, logits, missing weights."""

    vision: dict
    text = TEXT
    scales: dict = {}
    bfloat16_error = 1e-6

    @classmethod
    def config(cls, **more):
        model_cfg = {"embed_dim": 24, "vision_cfg": cls.vision, "text_cfg": cls.text, **cls.scales, **more}
        return OpenClipConfig(model_cfg=copy.deepcopy(model_cfg))

    def own(self, side=None, image_size=None, **more):
        """The model of open_clip, of the class that its factory would take, with the weights of a side."""
        model_cfg = self.config(**more).model_cfg
        if image_size:
            model_cfg["vision_cfg"]["image_size"] = image_size
        custom = self.text.get("no_causal_mask")
        model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**model_cfg).eval()
        if side is not None:
            weights = side.model.state_dict()
            if not custom:  # that class keeps the text tower at the top
                weights = {name.removeprefix("text."): weight for name, weight in weights.items()}
            if image_size:
                resize_pos_embed(weights, model)  # as open_clip does while it loads
            model.load_state_dict(weights)
        return model

    @pytest.mark.parametrize("quick_gelu", [False, True])
    @torch.no_grad()
    def test_text(self, quick_gelu):
        own = self.own(quick_gelu=quick_gelu)
        side = OpenClipSide(self.config(quick_gelu=quick_gelu)).eval()
        side.model.load_state_dict(convert_to_custom_text_state_dict(own.state_dict()))
        input_ids = make_inputs(side)[1]
        expected = own.encode_text(input_ids, normalize=True)
        torch.testing.assert_close(side.encode_text(input_ids), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @torch.no_grad()
    def test_a_loaded_side_equals_open_clip(self, side, folder, dtype):
        own = self.own(side).to(dtype)
        loaded = Enclosing.from_pretrained(folder, dtype=dtype).clip
        pixel_values, input_ids, _ = make_inputs(side)
        pixel_values = pixel_values.to(dtype)
        own_maps = own.visual.forward_intermediates(pixel_values, stop_early=True)["image_intermediates"]
        for found, expected in (
            (loaded.model.encode_image(pixel_values, normalize=True), own.encode_image(pixel_values, True)),
            (loaded.encode_text(input_ids), own.encode_text(input_ids, True)),
            (loaded.encode_image(pixel_values).maps[-1], own_maps[-1]),
        ):
            scale, atol = expected.abs().max(), self.bfloat16_error if dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=atol)

    @torch.no_grad()
    def test_logits_are_those_the_tower_was_trained_with(self, side):
        pixel_values, input_ids, _ = make_inputs(side)
        found = side.model.encode_image(pixel_values, normalize=True) @ side.encode_text(input_ids).T
        expected = side.model.get_logits(pixel_values, input_ids)[0]
        torch.testing.assert_close((found + side.logit_shift) * side.logit_scale, expected, rtol=1e-5, atol=1e-5)

    def test_weights_that_a_checkpoint_lacks_are_drawn_anew(self, side):
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

    @torch.no_grad()
    def check_whole_image(self, side):
        """The whole image pools to the embedding that the tower gives."""
        pixel_values, _, _ = make_inputs(side)
        features = side.encode_image(pixel_values)
        expected = normalize(side.model.encode_image(pixel_values), dim=-1)
        box = torch.tensor([[[0.0, 0.0, side.image_size, side.image_size]]]).repeat(2, 1, 1)
        for pooled in (side.pool(features, masks=torch.ones(2, 1, 8, 8)), side.pool(features, boxes=box)):
            torch.testing.assert_close(pooled[:, 0], expected, rtol=0, atol=1e-6)

    @torch.no_grad()
    def check_any_size(self, side):
        """A pyramid takes images of any size, and a mask pools as its box."""
        features = side.encode_image(torch.randn(1, 3, 96, 160))
        assert [tuple(m.shape[-2:]) for m in features.maps] == [(24, 40), (12, 20), (6, 10), (3, 5)]
        right = torch.zeros(1, 1, 96, 160)
        right[..., 80:] = 1
        box = torch.tensor([[[80.0, 0.0, 160.0, 96.0]]])
        torch.testing.assert_close(side.pool(features, masks=right), side.pool(features, boxes=box))


class TestOpenClipVit(OpenClipTester):
    vision = VIT | {"layers": 4}

    @torch.no_grad()
    def test_locations_are_embedded_by_the_value_path(self, side):
        features, visual = side.encode_image(make_inputs(side)[0]), side.model.visual
        block, tokens = visual.transformer.resblocks[-1], features.maps[-2].flatten(2).mT
        attention, width = block.attn, tokens.shape[-1]
        value = block.ln_1(tokens) @ attention.in_proj_weight[2 * width :].T + attention.in_proj_bias[2 * width :]
        tokens = tokens + attention.out_proj(value)
        tokens = tokens + block.mlp(block.ln_2(tokens))
        expected = (visual.ln_post(tokens) @ visual.proj).mT.reshape(features.pool_map.shape)
        torch.testing.assert_close(features.pool_map, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("size", [(48, 48), (24, 24), (32, 64)])
    @torch.no_grad()
    def test_another_size_is_the_model_that_open_clip_would_load(self, side, size):
        pixel_values = torch.randn(2, 3, *size)
        expected = self.own(side, image_size=size).visual.forward_intermediates(pixel_values)["image_intermediates"]
        found = side.encode_image(pixel_values)
        for mine, theirs in zip(found.maps, [expected[block] for block in side.tower.blocks], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        assert found.pool_map.shape[-2:] == (size[0] // 8, size[1] // 8)

    def test_a_side_built_from_its_config_keeps_the_init_of_open_clip(self):
        torch.manual_seed(0)
        own = open_clip.CustomTextCLIP(**self.config().model_cfg).state_dict()
        torch.manual_seed(0)
        side = OpenClipSide(self.config()).model.state_dict()
        assert all(torch.equal(side[name], weight) for name, weight in own.items())

    @pytest.mark.parametrize("model_cfg", [{"multimodal_cfg": {}}, {"text_cfg": {"hf_model_name": "roberta-base"}}])
    def test_towers_that_need_other_files_raise_an_error(self, model_cfg):
        with pytest.raises(InputError, match="not supported"):
            OpenClipSide(self.config(**model_cfg))

    def test_a_swin_of_another_size_raises_an_error(self):
        with torch.device("meta"):
            tower = timm_tower("swin_tiny_patch4_window7_224", 224, pool="avg")
            side = OpenClipSide(self.config(vision_cfg=tower), part="vision")
            with pytest.raises(InputError, match="224 x 224 pixels only, not 256 x 256"):
                side.encode_image(torch.empty(1, 3, 256, 256))


class TestOpenClipAverageVit(TestOpenClipVit):
    vision = VIT | {"layers": 3, "pool_type": "avg"}
    test_locations_are_embedded_by_the_value_path = None  # it averages locations instead

    def test_the_whole_image(self, side):
        self.check_whole_image(side)


class TestOpenClipResNet(OpenClipTester):
    vision = {"image_size": 64, "layers": [1, 1, 2, 1], "width": 8, "head_width": 64}

    def pooled_locations(self, side, features, size):
        """Regions go through the whole pool; locations take the value path, by 1 x 1 kernels."""
        pool_map = features.pool_map
        for step in (side.model.visual.attnpool.v_proj, side.model.visual.attnpool.c_proj):
            pool_map = conv2d(pool_map, step.weight[..., None, None], step.bias)
        return normalize(pool_map, dim=1)

    def test_the_whole_image_and_any_size(self, side):
        assert side.strides == (4, 8, 16, 32)
        self.check_whole_image(side)
        self.check_any_size(side)

    @torch.no_grad()
    def test_maps_are_the_stages(self, side):
        visual, pixel_values = side.model.visual, make_inputs(side)[0]
        state, stages = visual.stem(pixel_values), (visual.layer1, visual.layer2, visual.layer3, visual.layer4)
        for stage, found in zip(stages, side.encode_image(pixel_values).maps, strict=True):
            state = stage(state)
            torch.testing.assert_close(found, state, rtol=0, atol=1e-6)

    @torch.no_grad()
    def test_the_attention_pool_is_exact(self, side):
        pool = side.model.visual.attnpool
        feature_map = torch.randn(5, pool.k_proj.in_features, 2, 2)
        torch.testing.assert_close(attention_pool(pool, feature_map), pool(feature_map), rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_regions_are_pooled_on_the_grid_of_the_tower_at_any_size(self, side):
        """A region of the size the tower was trained at is pooled alike, wherever it lies in a larger image."""
        features = side.encode_image(torch.randn(1, 3, 96, 160))
        expected = normalize(side.model.visual.attnpool(features.pool_map[..., 1:3, 2:4]), dim=-1)
        found = side.pool(features, boxes=torch.tensor([[[64.0, 32.0, 128.0, 96.0]]]))[:, 0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_a_mask_pools_as_its_box(self, side):
        features, masks = side.encode_image(make_inputs(side)[0]), torch.zeros(2, 2, 64, 64)
        masks[:, 0, 8:40, 16:64] = 1
        boxes = torch.tensor([[[16.0, 8.0, 64.0, 40.0], [0.0, 0.0, 0.0, 0.0]]]).repeat(2, 1, 1)
        torch.testing.assert_close(side.pool(features, masks=masks), side.pool(features, boxes=boxes))

    def test_the_config_survives_its_json(self, tmp_path):
        config = self.config()
        config.image_size, config.image_mean = 128, (0.1, 0.2, 0.3)
        config.save_pretrained(tmp_path)
        loaded = OpenClipConfig.from_pretrained(tmp_path)
        assert loaded.model_cfg == config.model_cfg and loaded.image_size == 128
        assert tuple(loaded.image_mean) == (0.1, 0.2, 0.3) and OpenClipConfig().image_size == 224


class TestOpenClipConvNext(OpenClipTester):
    vision = timm_tower("test_convnext", 64)

    def test_the_whole_image_and_any_size(self, side):
        assert side.strides == (4, 8, 16, 32)
        self.check_whole_image(side)
        self.check_any_size(side)


class TimmVitTester(OpenClipTester):
    other_sizes: tuple = ()
    value_block: int  # whose output the value path reads

    @torch.no_grad()
    def test_other_sizes_are_those_that_open_clip_would_set(self, side):
        for size in self.other_sizes:
            own = self.own(side)
            own.visual.set_input_size(size)  # as the factory of open_clip does after loading
            pixel_values = torch.randn(1, 3, *size)
            expected = own.visual.forward_intermediates(pixel_values)["image_intermediates"]
            found = side.encode_image(pixel_values).maps
            for mine, theirs in zip(found, [expected[block] for block in side.tower.blocks], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
            whole = own.encode_image(pixel_values)
            torch.testing.assert_close(side.model.encode_image(pixel_values), whole, rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_locations_are_embedded_by_the_value_path(self, side):
        pixel_values, visual = make_inputs(side)[0], side.model.visual
        options = {"output_fmt": "NLC", "intermediates_only": True}
        (tokens,) = visual.trunk.forward_intermediates(pixel_values, [self.value_block], **options)
        found = side.encode_image(pixel_values).pool_map
        torch.testing.assert_close(found, self.value(visual, tokens).mT.reshape(found.shape), rtol=1e-5, atol=1e-5)


class TestTimmVit(TimmVitTester):
    vision = timm_tower("test_vit", 160, pool="token")
    other_sizes = ((192, 192),)
    value_block = 4

    def value(self, visual, tokens):
        block, width = visual.trunk.blocks[-1], tokens.shape[-1]
        value = block.norm1(tokens) @ block.attn.qkv.weight[2 * width :].T + block.attn.qkv.bias[2 * width :]
        tokens = tokens + block.ls1(block.attn.proj(value))
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        return visual.head(visual.trunk.norm(tokens))


class TestTimmSiglip(TimmVitTester):
    vision, text = timm_tower("test_vit", 160, pool="map", proj=None), SIGLIP_TEXT
    scales = {"init_logit_scale": 2.3, "init_logit_bias": -10.0}
    text_padding, softmax = "max_length", False
    other_sizes = ((96, 128), (192, 192))
    value_block = 5

    def value(self, visual, tokens):
        head, tokens = visual.trunk.attn_pool, visual.trunk.norm(tokens)
        width = tokens.shape[-1]
        tokens = head.proj(tokens @ head.kv.weight[width:].T + head.kv.bias[width:])
        tokens = tokens + head.mlp(head.norm(tokens))
        return visual.head(visual.trunk.head(tokens))

    @torch.no_grad()
    def test_pixels_outside_whole_patches_are_dropped(self, side):
        """As in SigLIP's so400m-patch14-384, whose 27 patches cover 378 pixels."""
        pixel_values = torch.randn(1, 3, 167, 160)
        found, expected = side.encode_image(pixel_values), side.encode_image(pixel_values[..., :160, :])
        torch.testing.assert_close(found.pool_map, expected.pool_map, rtol=0, atol=0)


@pytest.mark.slow
class TestTimmRope(TimmVitTester):
    vision = timm_tower("eva02_tiny_patch14_224", 224, pool="token")
    other_sizes = ((252, 252), (112, 140))
    bfloat16_error = 0.03  # rotary tables stay in float32 here; open_clip rounds them
    test_locations_are_embedded_by_the_value_path = None  # written out for the other towers of timm


# ---------------------------------------------------------------------------------------------------- transformers


class TransformersTester(ClipSideTester):
    """Adds the comparison with transformers itself: words, logits, the last map."""

    def own_images(self, side, pixel_values):
        """The pixels as arguments of the model of transformers."""
        return {"pixel_values": pixel_values}

    @torch.no_grad()
    def test_text_and_logits_are_those_of_transformers(self, side):
        pixel_values, input_ids, _ = make_inputs(side)
        text = normalize(side.model.get_text_features(input_ids).pooler_output, dim=-1)
        torch.testing.assert_close(side.encode_text(input_ids), text, rtol=0, atol=1e-6)
        pixels = self.own_images(side, pixel_values)
        images = normalize(side.model.get_image_features(**pixels).pooler_output, dim=-1)
        logits = side.model(input_ids=input_ids, **pixels).logits_per_image
        found = (images @ side.encode_text(input_ids).T + side.logit_shift) * side.logit_scale
        torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def check_any_size(self, side):
        """Maps are hidden states of transformers, at the size of the tower and at any other."""
        for size in ((32, 32), (48, 64)):
            pixel_values, cells = torch.randn(1, 3, *size), (size[0] // 8, size[1] // 8)
            found = side.encode_image(pixel_values)
            options = {"interpolate_pos_encoding": True, "output_hidden_states": True}
            own = side.model.vision_model(pixel_values, **options).hidden_states[-1]
            assert found.pool_map.shape == (1, side.embed_dim, *cells)
            expected = own[:, -cells[0] * cells[1] :].mT.unflatten(2, cells)
            torch.testing.assert_close(found.maps[-1], expected, rtol=0, atol=1e-6)

    def check_value_path(self, side, features, tokens):
        expected = tokens.mT.reshape(features.pool_map.shape)
        torch.testing.assert_close(features.pool_map, expected, rtol=1e-5, atol=1e-5)


class TestClip(TransformersTester):
    @classmethod
    def config(cls):
        return CLIPConfig(text_config=HF_TEXT, vision_config=HF_VISION, projection_dim=24)

    def test_any_size(self, side):
        assert side.strides == (8, 8, 8, 8)
        self.check_any_size(side)

    @torch.no_grad()
    def test_locations_are_embedded_by_the_value_path(self, side):
        features, vision = side.encode_image(make_inputs(side)[0]), side.model.vision_model
        block, tokens = vision.encoder.layers[-1], features.maps[-2].flatten(2).mT
        tokens = tokens + block.self_attn.out_proj(block.self_attn.v_proj(block.layer_norm1(tokens)))
        tokens = tokens + block.mlp(block.layer_norm2(tokens))
        self.check_value_path(side, features, side.model.visual_projection(vision.post_layernorm(tokens)))


class TestSiglip(TransformersTester):
    text_padding, softmax = "max_length", False

    @classmethod
    def config(cls):
        return SiglipConfig(text_config=HF_TEXT | {"projection_size": 32}, vision_config=HF_VISION)

    def test_any_size(self, side):
        self.check_any_size(side)

    @torch.no_grad()
    def test_locations_are_embedded_by_the_value_path(self, side):
        features, vision = side.encode_image(make_inputs(side)[0]), side.model.vision_model
        tokens = vision.post_layernorm(features.maps[-1].flatten(2).mT)
        attention, width = vision.head.attention, tokens.shape[-1]
        value = tokens @ attention.in_proj_weight[2 * width :].T + attention.in_proj_bias[2 * width :]
        tokens = attention.out_proj(value)
        self.check_value_path(side, features, tokens + vision.head.mlp(vision.head.layernorm(tokens)))


class TestSiglip2(TransformersTester):
    text_padding, softmax = "max_length", False

    @classmethod
    def config(cls):
        vision = HF_TOWER | {"num_patches": 16, "patch_size": 8}
        return Siglip2Config(text_config=HF_TEXT | {"projection_size": 32}, vision_config=vision)

    def patches(self, images, **options):
        return Siglip2ImageProcessor(patch_size=8, max_num_patches=16, do_rescale=False, **options)(
            images, return_tensors="pt"
        )

    def own_images(self, side, pixel_values):
        return self.patches(list(pixel_values), do_normalize=False)

    @pytest.mark.parametrize("size", [(32, 32), (24, 40)])
    @torch.no_grad()
    def test_patches_are_cut_as_by_its_own_processor(self, side, size):
        assert side.image_size == 32 and side.strides[0] == 8
        image = torch.rand(3, *size)
        patches = self.patches(image)
        assert patches["spatial_shapes"].tolist() == [[size[0] // 8, size[1] // 8]]  # of this size already
        mean, std = (torch.tensor(values)[:, None, None] for values in (side.image_mean, side.image_std))
        vision = side.model.vision_model
        own = vision(**patches)
        tokens = vision.post_layernorm(side.encode_image(((image - mean) / std)[None]).maps[-1].flatten(2).mT)
        torch.testing.assert_close(tokens, own.last_hidden_state[:, : tokens.shape[1]], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(vision.head(tokens), own.pooler_output, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- regions


def test_four_blocks_are_spread_evenly():
    assert [map_blocks(depth) for depth in (2, 4, 12, 24)] == [[0, 1], [0, 1, 2, 3], [2, 5, 8, 11], [5, 11, 17, 23]]


def test_mask_pool_weighs_by_area():
    feature_map = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    masks = torch.zeros(1, 3, 4, 4)
    masks[0, 0, :, :2] = 1  # the left half
    masks[0, 1, 0, 0] = 0.5  # a quarter of one cell
    masks[0, 1, 3, 2:] = 0.5  # and half of another
    torch.testing.assert_close(mask_pool(feature_map, masks), torch.tensor([[[2.0], [3.0], [0.0]]]))


def test_boxes_and_masks_convert():
    boxes = torch.tensor([[[8.0, 0.0, 24.0, 16.0], [4.0, 6.0, 12.0, 8.0], [3.0, 3.0, 3.0, 3.0]]])
    masks = boxes_to_masks(boxes, (3, 4), 8)
    expected = torch.zeros(1, 3, 3, 4)
    expected[0, 0, :2, 1:3] = 1
    expected[0, 1, 0, 0] = expected[0, 1, 0, 1] = 4 * 2 / 64
    torch.testing.assert_close(masks, expected)
    back = masks_to_boxes(masks > 0.5) * 8
    assert back.tolist() == [[[8, 0, 24, 16], [0, 0, 0, 0], [0, 0, 0, 0]]]


def test_the_value_path_keeps_locations_apart_and_in_order():
    feature_map, weight = torch.randn(2, 3, 4, 5), torch.randn(3, 7)
    found = value_path(lambda tokens: tokens.cumsum(1)[:, -1] @ weight, feature_map)
    torch.testing.assert_close(found, torch.einsum("bchw,cd->bdhw", feature_map, weight))
