"""What single families of the SAM side do of their own, and other image encoders under SAM 2's neck."""

import pytest
import timm
import torch
import torch.nn.functional as F
from test_sam_side import (
    CONFIGS,
    GRID,
    SIZE,
    Whole,
    assert_equal_outputs,
    assert_same_masks,
    boxes,
    build,
    edgetam_config,
    images,
    points,
    randomise,
    sam2_config,
    sam3_tracker_config,
    transformers_model,
    whole,
)
from transformers import (
    AutoConfig,
    ConvNextV2Config,
    HieraConfig,
    PreTrainedConfig,
    Sam3TrackerModel,
    SamImageProcessor,
    SamModel,
    TimmBackboneConfig,
)

from ovsam.errors import InputError
from ovsam.modeling.sam import SAM_SIDES, EfficientTamConfig, SamTrunk, SamTrunkConfig

STAGES = [f"stage{i}" for i in range(1, 5)]


# ----------------------------------------------------------------------------------------------- other image encoders


def hiera():
    sizes = {"image_size": [SIZE, SIZE], "patch_padding": [3, 3], "masked_unit_size": [8, 8]}
    return HieraConfig(embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2], out_features=STAGES, **sizes)


def convnextv2():
    return ConvNextV2Config(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_features=STAGES)


def timm_backbone(name, out_indices):
    return TimmBackboneConfig(backbone=name, out_indices=out_indices)


# Each with its channels, coarsest first, as SAM 2's neck wants them.
TRUNKS = {
    "hiera": (hiera, (64, 32, 16, 8)),
    "convnextv2": (convnextv2, (32, 24, 16, 8)),
    "repvit": (lambda: timm_backbone("repvit_m0_9", [0, 1, 2, 3]), (384, 192, 96, 48)),
    "regnet": (lambda: timm_backbone("regnetx_002", [1, 2, 3, 4]), (368, 152, 56, 24)),
    "timm convnext": (lambda: timm_backbone("test_convnext", [0, 1, 2, 3]), (64, 48, 32, 24)),
}


@pytest.fixture(params=TRUNKS)
def trunk_config(request):
    config, channels = TRUNKS[request.param]
    return sam2_config(SamTrunkConfig(backbone_config=config()), channels)


@torch.no_grad()
def test_sam2_stands_on_any_trunk(trunk_config, tmp_path):
    """The neck gets the maps the trunk's own library gives, and everything survives a file."""
    model = whole(trunk_config)
    trunk = model.sam.model.vision_encoder.backbone
    maps = trunk.backbone(images()).feature_maps
    for map, given in zip(maps, trunk(images()).intermediate_hidden_states, strict=True):
        assert torch.equal(given.permute(0, 3, 1, 2), map)
    coarsest = model.sam.model.vision_encoder.neck.convs[0](maps[3])
    expected = model.sam.model.vision_encoder.neck.convs[1](maps[2]) + F.interpolate(coarsest, scale_factor=2.0)
    torch.testing.assert_close(model.sam.encode(images()).pyramid[2], expected)

    model.save_pretrained(tmp_path)
    reloaded = Whole.from_pretrained(tmp_path)
    assert type(reloaded.config.sam_config.vision_config.backbone_config) is SamTrunkConfig
    assert_equal_outputs(model.sam, reloaded.sam, boxes())


@torch.no_grad()
def test_a_trunk_of_timm_is_timms():
    trunk = SamTrunk(SamTrunkConfig(backbone_config=timm_backbone("test_convnext", [0, 1, 2, 3]))).eval()
    tower = timm.create_model("test_convnext", features_only=True).eval()
    tower.load_state_dict(
        {name.removeprefix("backbone._backbone."): tensor for name, tensor in trunk.state_dict().items()}
    )
    for here, there in zip(trunk(images()).intermediate_hidden_states, tower(images()), strict=True):
        torch.testing.assert_close(here.permute(0, 3, 1, 2), there)


@pytest.mark.parametrize("tower, out_indices", [("test_convnext", [1, 2, 3]), ("test_resnet", [0, 1, 2, 3])])
def test_a_trunk_without_the_four_strides_is_refused(tower, out_indices):
    trunk = SamTrunk(SamTrunkConfig(backbone_config=timm_backbone(tower, out_indices)))
    with pytest.raises(InputError, match=r"strides 4, 8, 16 and 32; .* for images of 128 pixels"):
        trunk(images())


@torch.no_grad()
def test_edgetam_stands_on_its_own_trunk():
    """RepViT, as released."""
    config = edgetam_config("repvit_m0_9", (384, 192, 96, 48))
    config.vision_config.backbone_config.model_args["out_indices"] = [0, 1, 2, 3]
    side = randomise(SAM_SIDES["edgetam"](config))
    expected = transformers_model(side)(images(), multimask_output=True, **points())
    assert_same_masks(side.select_masks(side.decode(side.encode(images()), **points()), True), expected)


# ------------------------------------------------------------------------------------------------------ SAM 1, SAM-HQ


@torch.no_grad()
def test_sam1_sees_its_own_padding():
    """Through transformers' processor, which pads: the same tensor, the same masks."""
    side = build("sam")
    stock = transformers_model(side)
    assert isinstance(stock, SamModel)
    pad = {"height": SIZE, "width": SIZE}
    processor = SamImageProcessor(size={"longest_edge": SIZE}, pad_size=pad)
    picture = torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(6))
    inputs = processor(picture, return_tensors="pt")
    assert inputs["reshaped_input_sizes"].tolist() == [[85, SIZE]]
    assert (inputs["pixel_values"][:, :, 85:] == 0).all()
    prompts = boxes(b=1)
    decoded = side.select_masks(side.decode(side.encode(inputs["pixel_values"]), **prompts), False)
    assert_same_masks(decoded, stock(inputs["pixel_values"], multimask_output=False, **prompts))


@torch.no_grad()
def test_sam_hq_reads_an_early_block():
    """Its finer features change with the first global block alone, and its masks with them."""
    side = build("sam_hq")
    features = side.encode(images())
    before = side.decode(features, **boxes())
    seen = side.model.vision_encoder(images()).intermediate_embeddings
    assert len(seen) == 1 and seen[0].shape == (2, GRID, GRID, 16)
    side.model.mask_decoder.compress_vit_conv2.bias += 1.0
    moved = side.encode(images())
    assert torch.equal(moved.embedding, features.embedding)
    torch.testing.assert_close(moved.high_res[0], features.high_res[0] + 1.0)
    after = side.decode(moved, **boxes())
    assert (after.masks - before.masks).abs().mean() > 0.1 and torch.equal(after.iou, before.iou)


# --------------------------------------------------------------------------------------- SAM 3's tracker, EfficientTAM


@torch.no_grad()
def test_sam3_has_patches_of_fourteen_pixels():
    config = sam3_tracker_config()
    config.vision_config.backbone_config.image_size = config.prompt_encoder_config.image_size = 112
    config.vision_config.backbone_config.patch_size = config.prompt_encoder_config.patch_size = 14
    side = randomise(SAM_SIDES["sam3_tracker"](config))
    assert (side.image_size, side.grid, side.pyramid_strides) == (112, 8, (3.5, 7, 14))
    pictures, prompts = images()[..., :112, :112], {"input_boxes": boxes()["input_boxes"] * 112 / SIZE}
    decoded = side.select_masks(side.decode(side.encode(pictures), **prompts), True)
    assert_same_masks(decoded, transformers_model(side)(pictures, multimask_output=True, **prompts))


@torch.no_grad()
def test_sam3_with_a_fourth_map_is_transformers_too():
    """It adds its no_memory_embedding to the last map, whether or not the decoder reads it."""
    side = randomise(SAM_SIDES["sam3_tracker"](sam3_tracker_config(scales=(4.0, 2.0, 1.0, 0.5))))
    stock = transformers_model(side)
    assert isinstance(stock, Sam3TrackerModel) and side.model.no_memory_embedding.abs().max() > 0
    features = side.encode(images())
    assert len(features.pyramid) == 3
    decoded = side.select_masks(side.decode(features, **boxes()), True)
    assert_same_masks(decoded, stock(images(), multimask_output=True, **boxes()))


def test_sam3_with_other_scales_is_refused():
    with pytest.raises(InputError, match=r"must begin with 4, 2, 1; got \[2.0, 1.0, 0.5\]"):
        SAM_SIDES["sam3_tracker"](sam3_tracker_config(scales=(2.0, 1.0, 0.5)))


def test_efficienttam_is_by_default_the_released_small_one():
    config = EfficientTamConfig()
    vision = config.vision_config
    assert (vision.hidden_size, vision.num_attention_heads, vision.num_hidden_layers) == (384, 6, 12)
    assert (vision.window_size, tuple(vision.global_attn_indexes), vision.mlp_dim) == (14, (2, 5, 8, 11), 1536)
    assert not vision.use_rel_pos and config.mask_decoder_config.dynamic_multimask_via_stability
    with torch.device("meta"):
        names = SAM_SIDES["efficienttam"](config).state_dict()
    assert names["model.vision_encoder.pos_embed"].shape == (1, 64, 64, 384)
    assert not any("conv_s" in name or "rel_pos" in name for name in names)


@pytest.mark.parametrize("family", CONFIGS)
def test_configurations_survive_a_dictionary(family):
    config = CONFIGS[family]()
    again = AutoConfig.for_model(**config.to_dict())
    assert isinstance(again, PreTrainedConfig) and again.to_dict() == config.to_dict()


@pytest.mark.parametrize("family", ["sam2"])
@torch.no_grad()
def test_a_side_compiles_into_one_graph(family):
    torch._dynamo.reset()
    side = build(family)

    def ask(pixels, given):
        return side.select_masks(side.decode(side.encode(pixels), input_boxes=given), False).masks

    given = boxes()["input_boxes"]
    compiled = torch.compile(ask, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images(), given), ask(images(), given), rtol=1e-4, atol=1e-4)
