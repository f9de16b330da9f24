"""The SAM sides: each family against its own library at tiny random size, and particular families."""

import pytest
import timm
import torch
import torch.nn.functional as F
from common import GRID, SIZE, C, sam_config, timm_trunk
from testers.sam_side import (
    SamSideTester,
    Whole,
    assert_equal_outputs,
    assert_same_masks,
    boxes,
    build_side,
    build_whole,
    images,
    points,
    repair_sam_hq,
    transformers_model,
)
from transformers import (
    ConvNextV2Config,
    EdgeTamVideoConfig,
    EdgeTamVideoModel,
    HieraConfig,
    Sam2Model,
    Sam3TrackerModel,
    SamImageProcessor,
    SamModel,
    TimmBackboneConfig,
)
from transformers.models.sam2.modeling_sam2 import Sam2MaskDecoder

from ovsam.errors import InputError
from ovsam.modeling.sam import SAM_SIDES, EfficientTamConfig, SamTrunk, SamTrunkConfig


class TestSam2(SamSideTester):
    family = "sam2"

    @pytest.mark.slow
    @torch.no_grad()
    def test_it_compiles_into_one_graph(self, side):
        torch._dynamo.reset()

        def ask(pixels, given):
            return side.select_masks(side.decode(side.encode(pixels), input_boxes=given), False).masks

        given = boxes()["input_boxes"]
        compiled = torch.compile(ask, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images(), given), ask(images(), given), rtol=1e-4, atol=1e-4)


class TestEdgeTam(SamSideTester):
    family = "edgetam"

    def test_trunks_with_non_persistent_buffers_survive_loading(self, tmp_path):
        """timm computes them at construction, and from_pretrained leaves uninitialised memory in their place."""
        trunk = timm_trunk("test_coatnet", img_size=SIZE)
        model = build_whole(sam_config("edgetam", backbone_config=trunk, backbone_channel_list=[128, 96, 64, 32]))
        assert dict(model.named_non_persistent_buffers())
        model.save_pretrained(tmp_path)
        assert_equal_outputs(model.sam, Whole.from_pretrained(tmp_path).sam, boxes())

    def test_weights_load_strictly_into_the_video_model(self, side):
        parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
        config = {name: getattr(side.model.config, name).to_dict() for name in parts}
        memory = {"memory_attention_hidden_size": C, "memory_encoder_hidden_size": C}
        video = EdgeTamVideoModel(EdgeTamVideoConfig(**config, **memory, image_size=SIZE))
        for name in ("vision_encoder", "prompt_encoder", "mask_decoder", "shared_image_embedding"):
            getattr(video, name).load_state_dict(getattr(side.model, name).state_dict(), strict=True)
        assert video.no_memory_embedding.shape == side.model.no_memory_embedding.shape

    @torch.no_grad()
    def test_the_released_trunk(self):
        """RepViT, at full size."""
        trunk = timm_trunk("repvit_m0_9", out_indices=[0, 1, 2, 3])
        side = build_side(sam_config("edgetam", backbone_config=trunk, backbone_channel_list=[384, 192, 96, 48]))
        expected = transformers_model(side)(images(), multimask_output=True, **points())
        assert_same_masks(side.select_masks(side.decode(side.encode(images()), **points()), True), expected)


class TestSam3Tracker(SamSideTester):
    family = "sam3_tracker"

    @torch.no_grad()
    def test_patches_of_fourteen_pixels(self):
        config = self.config()
        config.vision_config.backbone_config.image_size = config.prompt_encoder_config.image_size = 112
        config.vision_config.backbone_config.patch_size = config.prompt_encoder_config.patch_size = 14
        side = build_side(config)
        assert (side.image_size, side.grid, side.pyramid_strides) == (112, 8, (3.5, 7, 14))
        pictures, prompts = images()[..., :112, :112], {"input_boxes": boxes()["input_boxes"] * 112 / SIZE}
        decoded = side.select_masks(side.decode(side.encode(pictures), **prompts), True)
        assert_same_masks(decoded, transformers_model(side)(pictures, multimask_output=True, **prompts))

    @torch.no_grad()
    def test_a_fourth_map(self):
        """The no_memory_embedding is added to the last map, whether or not the decoder reads it."""
        side = build_side(sam_config("sam3_tracker", scale_factors=[4.0, 2.0, 1.0, 0.5]))
        own = transformers_model(side)
        assert isinstance(own, Sam3TrackerModel) and side.model.no_memory_embedding.abs().max() > 0
        features = side.encode(images())
        assert len(features.pyramid) == 3
        decoded = side.select_masks(side.decode(features, **boxes()), True)
        assert_same_masks(decoded, own(images(), multimask_output=True, **boxes()))

    def test_other_scales_raise_an_error(self):
        with pytest.raises(InputError, match=r"must begin with 4, 2, 1; got \[2.0, 1.0, 0.5\]"):
            build_side(sam_config("sam3_tracker", scale_factors=[2.0, 1.0, 0.5]))


class TestSam1(SamSideTester):
    family, pyramid, finer_maps, by_stability = "sam", False, 0, False

    @torch.no_grad()
    def test_padding_is_part_of_the_image(self, side, own):
        """The processor of transformers pads; the side encodes the padded tensor, as the model of transformers does."""
        assert isinstance(own, SamModel)
        processor = SamImageProcessor(size={"longest_edge": SIZE}, pad_size={"height": SIZE, "width": SIZE})
        picture = torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(6))
        inputs = processor(picture, return_tensors="pt")
        assert inputs["reshaped_input_sizes"].tolist() == [[85, SIZE]]
        assert (inputs["pixel_values"][:, :, 85:] == 0).all()
        prompts = boxes(b=1)
        decoded = side.select_masks(side.decode(side.encode(inputs["pixel_values"]), **prompts), False)
        assert_same_masks(decoded, own(inputs["pixel_values"], multimask_output=False, **prompts))


class TestSamHq(SamSideTester):
    family, pyramid, finer_maps, by_stability = "sam_hq", False, 1, False

    @classmethod
    def own_model(cls, side):
        model = transformers_model(side)
        repair_sam_hq(model.mask_decoder)
        return model

    def order_of_three(self, iou):
        return iou.argsort(-1, descending=True)

    @torch.no_grad()
    def test_finer_features_come_from_an_early_block(self):
        """They change with the first global block alone, and the masks with them."""
        side = build_side(self.config())
        features = side.encode(images())
        before = side.decode(features, **boxes())
        early = side.model.vision_encoder(images()).intermediate_embeddings
        assert len(early) == 1 and early[0].shape == (2, GRID, GRID, 16)
        side.model.mask_decoder.compress_vit_conv2.bias += 1.0
        moved = side.encode(images())
        assert torch.equal(moved.embedding, features.embedding)
        torch.testing.assert_close(moved.high_res[0], features.high_res[0] + 1.0)
        after = side.decode(moved, **boxes())
        assert (after.masks - before.masks).abs().mean() > 0.1 and torch.equal(after.iou, before.iou)


class TestEfficientTam(SamSideTester):
    family, pyramid, finer_maps = "efficienttam", False, 0

    @classmethod
    def own_model(cls, side):
        """transformers has no EfficientTAM; a SAM 2 with finer maps of zeros gives the masks of its embedding."""
        model = Sam2Model(sam_config("sam2")).eval()
        decoder = Sam2MaskDecoder(model.config.mask_decoder_config).eval()
        decoder.load_state_dict(side.model.mask_decoder.state_dict(), strict=False)  # all but conv_s0, conv_s1
        model.mask_decoder, model.prompt_encoder = decoder, side.model.prompt_encoder
        model.shared_image_embedding = side.model.prompt_encoder.shared_embedding

        def forward(pixel_values, **prompts):
            features = side.encode(pixel_values).embedding
            finer = [features.new_zeros(len(features), C // 8 * i, 4 * GRID // i, 4 * GRID // i) for i in (1, 2)]
            return model(image_embeddings=[*finer, features], **prompts)

        return forward

    def test_the_default_is_the_released_small_one(self):
        config = EfficientTamConfig()
        vision = config.vision_config
        assert (vision.hidden_size, vision.num_attention_heads, vision.num_hidden_layers) == (384, 6, 12)
        assert (vision.window_size, tuple(vision.global_attn_indexes), vision.mlp_dim) == (14, (2, 5, 8, 11), 1536)
        assert not vision.use_rel_pos and config.mask_decoder_config.dynamic_multimask_via_stability
        with torch.device("meta"):
            names = SAM_SIDES["efficienttam"](config).state_dict()
        assert names["model.vision_encoder.pos_embed"].shape == (1, 64, 64, 384)
        assert not any("conv_s" in name or "rel_pos" in name for name in names)


# ------------------------------------------------------------------------------- other image encoders in SAM 2's place

STAGES = [f"stage{i}" for i in range(1, 5)]


def timm_backbone(name, out_indices):
    return TimmBackboneConfig(backbone=name, out_indices=out_indices)


# Each with its channels, coarsest first, as SAM 2's neck reads them.
TRUNKS = {
    "hiera": (
        lambda: HieraConfig(
            embed_dim=8,
            depths=[1, 1, 2, 1],
            num_heads=[1, 1, 2, 2],
            out_features=STAGES,
            image_size=[SIZE, SIZE],
            patch_padding=[3, 3],
            masked_unit_size=[8, 8],
        ),
        [64, 32, 16, 8],
    ),
    "convnextv2": (
        lambda: ConvNextV2Config(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_features=STAGES),
        [32, 24, 16, 8],
    ),
    "regnet": (lambda: timm_backbone("regnetx_002", [1, 2, 3, 4]), [368, 152, 56, 24]),
    "timm convnext": (lambda: timm_backbone("test_convnext", [0, 1, 2, 3]), [64, 48, 32, 24]),
}


@pytest.mark.parametrize("kind", TRUNKS)
@torch.no_grad()
def test_other_trunks(kind, tmp_path):
    """The neck gets the maps that the trunk's own library gives, and everything survives a file."""
    config, channels = TRUNKS[kind]
    trunk_config = SamTrunkConfig(backbone_config=config())
    model = build_whole(sam_config("sam2", backbone_config=trunk_config, backbone_channel_list=channels))
    encoder = model.sam.model.vision_encoder
    maps = encoder.backbone.backbone(images()).feature_maps
    for map, given in zip(maps, encoder.backbone(images()).intermediate_hidden_states, strict=True):
        assert torch.equal(given.permute(0, 3, 1, 2), map)
    expected = encoder.neck.convs[1](maps[2]) + F.interpolate(encoder.neck.convs[0](maps[3]), scale_factor=2.0)
    torch.testing.assert_close(model.sam.encode(images()).pyramid[2], expected)

    model.save_pretrained(tmp_path)
    reloaded = Whole.from_pretrained(tmp_path)
    assert type(reloaded.config.sam_config.vision_config.backbone_config) is SamTrunkConfig
    assert_equal_outputs(model.sam, reloaded.sam, boxes())


@torch.no_grad()
def test_a_trunk_of_timm_gives_the_maps_of_timm():
    trunk = SamTrunk(SamTrunkConfig(backbone_config=timm_backbone("test_convnext", [0, 1, 2, 3]))).eval()
    tower = timm.create_model("test_convnext", features_only=True).eval()
    tower.load_state_dict(
        {name.removeprefix("backbone._backbone."): tensor for name, tensor in trunk.state_dict().items()}
    )
    for here, there in zip(trunk(images()).intermediate_hidden_states, tower(images()), strict=True):
        torch.testing.assert_close(here.permute(0, 3, 1, 2), there)


@pytest.mark.parametrize("tower, out_indices", [("test_convnext", [1, 2, 3]), ("test_resnet", [0, 1, 2, 3])])
def test_a_trunk_without_the_four_strides_raises_an_error(tower, out_indices):
    trunk = SamTrunk(SamTrunkConfig(backbone_config=timm_backbone(tower, out_indices)))
    with pytest.raises(InputError, match=r"strides 4, 8, 16 and 32; .* for images of 128 pixels"):
        trunk(images())
