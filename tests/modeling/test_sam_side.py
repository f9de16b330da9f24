"""Every SAM side against transformers' own model with the same weights, at tiny random size."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import (
    AutoConfig,
    EdgeTamConfig,
    EdgeTamVideoConfig,
    EdgeTamVideoModel,
    PreTrainedConfig,
    PreTrainedModel,
    Sam2Config,
    Sam2Model,
    Sam3TrackerConfig,
    SamConfig,
    SamHQConfig,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.models.sam2.modeling_sam2 import Sam2MaskDecoder

from ovsam.errors import InputError
from ovsam.modeling.sam import SAM_SIDES, DecodedMasks, EfficientTamConfig

SIZE, C = 128, 32
GRID = SIZE // 16
PROMPT = {"hidden_size": C, "image_size": SIZE}
DECODER = {"hidden_size": C, "mlp_dim": 48, "num_attention_heads": 4, "iou_head_hidden_dim": 16}
PYRAMID = {"backbone_feature_sizes": [[4 * GRID] * 2, [2 * GRID] * 2, [GRID] * 2], "fpn_hidden_size": C}
VIT = {
    "hidden_size": 16,
    "output_channels": C,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_dim": 24,
    "image_size": SIZE,
    "window_size": 3,  # does not divide the grid: windows are padded
    "global_attn_indexes": [1],
    "num_pos_feats": C // 2,
}


def edgetam_config(architecture="test_efficientnet", channels=(64, 48, 32, 24), **args):
    backbone = {
        "model_type": "timm_wrapper",
        "architecture": architecture,
        "num_classes": 0,
        "model_args": {"in_chans": 3, "features_only": True, "out_indices": [1, 2, 3, 4], **args},
    }
    vision = {"backbone_config": backbone, "backbone_channel_list": list(channels), "fpn_top_down_levels": [0, 1, 2, 3]}
    return EdgeTamConfig(vision_config=vision | PYRAMID, prompt_encoder_config=PROMPT, mask_decoder_config=DECODER)


def sam2_config(backbone=None, channels=(64, 32, 16, 8)):
    hiera = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "blocks_per_stage": [1, 1, 2, 1],
        "window_size_per_stage": [8, 4, 8, 4],
        "global_attention_blocks": [3],
        "window_positional_embedding_background_size": [7, 7],
        "image_size": [SIZE, SIZE],
    }
    vision = {"backbone_config": backbone or hiera, "backbone_channel_list": list(channels)}
    return Sam2Config(vision_config=vision | PYRAMID, prompt_encoder_config=PROMPT, mask_decoder_config=DECODER)


def sam_config():
    return SamConfig(vision_config=VIT, prompt_encoder_config=PROMPT, mask_decoder_config=DECODER)


def sam_hq_config():
    decoder = DECODER | {"vit_dim": VIT["hidden_size"]}
    return SamHQConfig(vision_config=VIT, prompt_encoder_config=PROMPT, mask_decoder_config=decoder)


def efficienttam_config():
    return EfficientTamConfig(vision_config=VIT, prompt_encoder_config=PROMPT, mask_decoder_config=DECODER)


def sam3_tracker_config(scales=(4.0, 2.0, 1.0)):
    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 16,
        "window_size": 4,
        "global_attn_indexes": [1],
        "pretrain_image_size": 64,
    }
    vision = PYRAMID | {"backbone_config": backbone, "scale_factors": list(scales)}
    prompt = PROMPT | {"patch_size": 16}
    return Sam3TrackerConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=DECODER)


CONFIGS = {
    "sam": sam_config,
    "sam_hq": sam_hq_config,
    "sam2": sam2_config,
    "edgetam": edgetam_config,
    "efficienttam": efficienttam_config,
    "sam3_tracker": sam3_tracker_config,
}
PYRAMIDS = ("sam2", "edgetam", "sam3_tracker")


def randomise(module):
    """Away from transformers' small initial weights, with which masks hardly depend on prompts."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if "backbone" not in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return module.eval()


def build(family):
    return randomise(SAM_SIDES[family](CONFIGS[family]()))


def efficienttam_by_sam2(side):
    """transformers has no EfficientTAM: a SAM 2 whose finer maps are nothing gives the masks of its embedding."""
    model = Sam2Model(sam2_config()).eval()
    decoder = Sam2MaskDecoder(model.config.mask_decoder_config).eval()
    decoder.load_state_dict(side.model.mask_decoder.state_dict(), strict=False)  # all but conv_s0, conv_s1
    model.mask_decoder, model.prompt_encoder = decoder, side.model.prompt_encoder
    model.shared_image_embedding = side.model.prompt_encoder.shared_embedding

    def forward(pixel_values, **prompts):
        features = side.encode(pixel_values).embedding
        nothing = [
            torch.zeros(len(features), C // 8, 4 * GRID, 4 * GRID),
            torch.zeros(len(features), C // 4, 2 * GRID, 2 * GRID),
        ]
        return model(image_embeddings=[*nothing, features], **prompts)

    return forward


def repair_sam_hq(decoder):
    """transformers 5.23 upscales the image as it was before the decoder's transformer, its rows and columns swapped;
    SAM-HQ's own code, and transformers' until 4.53, upscales what the transformer made of it."""
    seen = []
    decoder.transformer.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[1]))
    decoder.upscale_conv1.register_forward_pre_hook(
        lambda module, inputs: (seen.pop().transpose(2, 3).reshape(inputs[0].shape),)  # [B*P, 1, L, C] -> [.., C, h, w]
    )


def transformers_model(side):
    """transformers' model with the same weights."""
    if side.model.config.model_type == "efficienttam":
        return efficienttam_by_sam2(side)
    model = type(side.model)(side.model.config).eval()
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in side.state_dict().items()})
    if side.model.config.model_type == "sam_hq":
        repair_sam_hq(model.mask_decoder)
    return model


@pytest.fixture(scope="module")
def built():
    """One side of each family and its stock model; tests leave them as they are."""
    sides = {family: build(family) for family in CONFIGS}
    return {family: (side, transformers_model(side)) for family, side in sides.items()}


@pytest.fixture(params=CONFIGS)
def family(request):
    return request.param


@pytest.fixture
def side(built, family):
    return built[family][0]


@pytest.fixture
def stock(built, family):
    return built[family][1]


def images(b=2):
    return torch.randn(b, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def points(b=2, p=3, n=2):
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 2, (b, p, n), generator=generator)
    return {"input_points": torch.rand(b, p, n, 2, generator=generator) * SIZE, "input_labels": labels}


def boxes(b=2, p=3):
    corners = torch.rand(b, p, 2, 2, generator=torch.Generator().manual_seed(3)).sort(dim=2).values
    return {"input_boxes": corners.flatten(2) * SIZE}


def masks(b=2, p=3, size=4 * GRID):
    return {"input_masks": 4 * torch.randn(b, p, size, size, generator=torch.Generator().manual_seed(4))}


def padded():
    """The second prompt has one point, the third none: the processor fills up with label -10."""
    prompts = points()
    prompts["input_labels"][:, 1, 1:] = -10
    prompts["input_labels"][:, 2] = -10
    return prompts


PROMPTS = {
    "points": points(),
    "one point": points(p=1, n=1),
    "boxes": boxes(),
    "boxes and points": {**boxes(), **points()},
    "padded points": padded(),
    "nothing": {},
}


# ----------------------------------------------------------------------------------------------- encode and decode


@pytest.mark.parametrize("family", PYRAMIDS)
def test_pyramids_are_those_of_transformers(side, stock):
    features = side.encode(images())
    high_res_0, high_res_1, embedding = stock.get_image_embeddings(images())
    torch.testing.assert_close(features.embedding, embedding)
    torch.testing.assert_close(features.high_res, (high_res_0, high_res_1))
    for level, raw in enumerate(stock.vision_encoder(images()).fpn_hidden_states):
        torch.testing.assert_close(features.pyramid[level], raw)
        assert raw.shape[1:] == (side.pyramid_channels[level], *[SIZE // side.pyramid_strides[level]] * 2)
    assert (side.image_size, side.width, side.pyramid_strides) == (SIZE, C, (4, 8, 16))


@torch.no_grad()
@pytest.mark.parametrize("family", [family for family in CONFIGS if family not in PYRAMIDS])
def test_without_a_pyramid_there_is_one_map(side, family):
    features = side.encode(images())
    (raw,) = features.pyramid
    torch.testing.assert_close(raw, side.model.vision_encoder(images()).last_hidden_state)
    assert raw.shape == (2, C, GRID, GRID)
    assert (side.pyramid_channels, side.pyramid_strides) == ((C,), (16,))
    assert [tuple(fine.shape) for fine in features.high_res] == [(2, C // 8, 4 * GRID, 4 * GRID)] * (family == "sam_hq")


def test_gradients_reach_the_image_encoder(family):
    side = build(family)
    decoded = side.decode(side.encode(images()), **boxes())
    decoded.masks.square().mean().backward()
    first = next(side.model.vision_encoder.parameters())
    assert first.grad.abs().max() > 0


def assert_same_masks(decoded, expected, prompts=slice(None)):
    torch.testing.assert_close(decoded.masks[:, prompts], expected.pred_masks, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoded.iou[:, prompts], expected.iou_scores, rtol=1e-4, atol=1e-4)
    if "object_score_logits" in expected:
        object_logits = decoded.object_logits[:, prompts]
        torch.testing.assert_close(object_logits, expected.object_score_logits, rtol=1e-4, atol=1e-4)
    else:
        assert decoded.object_logits is None


@pytest.mark.parametrize("multimask_output", [True, False])
@pytest.mark.parametrize("prompts", PROMPTS)
@torch.no_grad()
def test_masks_are_those_of_transformers(side, stock, prompts, multimask_output):
    expected = stock(images(), multimask_output=multimask_output, **PROMPTS[prompts])
    decoded = side.select_masks(side.decode(side.encode(images()), **PROMPTS[prompts]), multimask_output)
    assert_same_masks(decoded, expected)


@pytest.mark.parametrize("size", [4 * GRID, SIZE])
@pytest.mark.parametrize("others", [boxes(), points(), {}], ids=["boxes", "points", "alone"])
@torch.no_grad()
def test_mask_prompts_are_those_of_transformers_asked_one_by_one(side, stock, others, size):
    given = masks(size=size)["input_masks"]
    # SAM 1 of transformers does not resize them.
    shrunk = F.interpolate(given, (4 * GRID, 4 * GRID), mode="bilinear", antialias=True)
    decoded = side.select_masks(side.decode(side.encode(images()), **others, input_masks=given), True)
    for i in range(3):
        one = {name: prompt[:, i : i + 1] for name, prompt in (others | {"input_masks": shrunk}).items()}
        assert_same_masks(decoded, stock(images(), multimask_output=True, **one), slice(i, i + 1))


def test_unstable_masks_give_way_to_the_best_of_the_others(side, family):
    """Whichever mask is chosen, its token is. SAM 1's configuration cannot say so, but it may be asked for."""
    torch.manual_seed(5)
    masks, iou, tokens = torch.randn(2, 3, 4, 8, 8), torch.rand(2, 3, 4), torch.randn(2, 3, 4, C)
    masks[0] *= 0.01  # hardly past the threshold: unstable
    masks[1] *= 1000
    masks[0, 2, 0] = -1.0  # empty: stable
    decoded = DecodedMasks(masks, iou, tokens, torch.randn(2, 3, 1))
    in_config = family not in ("sam", "sam_hq")
    selected = side.select_masks(decoded, False, by_stability=None if in_config else True)
    reference = Sam2MaskDecoder(sam2_config().mask_decoder_config)
    expected_masks, expected_iou = reference._dynamic_multimask_via_stability(masks, iou)
    assert torch.equal(selected.masks, expected_masks)
    assert torch.equal(selected.iou, expected_iou)
    best = (iou[..., 1:].argmax(-1) + 1).tolist()
    choice = [[best[0][0], best[0][1], 0], [0, 0, 0]]
    for b, p in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        assert torch.equal(selected.tokens[b, p, 0], tokens[b, p, choice[b][p]])
    asked = side.select_masks(decoded, False, by_stability=False)
    by_default = (
        side.select_masks(decoded, False) if not in_config else copy.deepcopy(side).train().select_masks(decoded, False)
    )
    assert torch.equal(asked.tokens, tokens[:, :, :1]) and torch.equal(by_default.tokens, tokens[:, :, :1])
    three = side.select_masks(decoded, True)
    order = torch.arange(3).expand(2, 3, 3) if family != "sam_hq" else iou[:, :, 1:].argsort(-1, descending=True)
    assert torch.equal(three.tokens, tokens[:, :, 1:].take_along_dim(order[..., None], 2))
    assert torch.equal(three.masks, masks[:, :, 1:].take_along_dim(order[..., None, None], 2))


# ------------------------------------------------------------------------------------------------- errors of users


@pytest.mark.parametrize(
    "prompts, said",
    [
        ({**boxes(), **points(p=2)}, r"input_points \[2, 2, 2, 2\].*input_boxes \[2, 3, 4\]"),
        (boxes(b=1), r"B = 2 images.*input_boxes \[1, 3, 4\]"),
        ({"input_boxes": boxes()["input_boxes"][0]}, r"input_boxes \[B, P, 4\].*got input_boxes \[3, 4\]"),
        ({**points(), "input_labels": points(n=1)["input_labels"]}, r"the same P and N.*input_labels \[2, 3, 1\]"),
        ({**boxes(), **masks(p=1)}, r"input_masks \[2, 1, 32, 32\]"),
    ],
)
def test_prompts_that_do_not_agree_are_refused(side, prompts, said):
    with pytest.raises(InputError, match=said):
        side.decode(side.encode(images()), **prompts)


def test_images_of_another_size_are_refused(side):
    with pytest.raises(InputError, match="128 x 128 pixels; got 128 x 96"):
        side.encode(images()[..., :96])


@torch.no_grad()
def test_finer_maps_that_are_missing_are_refused_and_others_passed_over(side):
    features = side.encode(images())
    expected = side.decode(features, **boxes()).masks
    features.high_res = (*features.high_res, *[torch.randn(2, C // 8, 4 * GRID, 4 * GRID)] * 2)
    assert torch.equal(side.decode(features, **boxes()).masks, expected)
    features.high_res = ()
    if side.finer_maps:
        with pytest.raises(InputError, match=f"reads {side.finer_maps} maps of high_res; the features have 0"):
            side.decode(features, **boxes())


def test_images_that_are_not_square_are_refused(family):
    config = CONFIGS[family]()
    config.prompt_encoder_config.image_size = [SIZE, SIZE]
    with pytest.raises(InputError, match="side of a square"):
        SAM_SIDES[family](config)


@pytest.mark.parametrize("family", PYRAMIDS)
def test_pyramids_that_do_not_fit_are_refused(family):
    config = CONFIGS[family]()
    config.vision_config.backbone_feature_sizes = [[256, 256], [128, 128], [64, 64]]  # transformers' default, 1024 px
    with pytest.raises(InputError, match=r"must be \[\[32, 32\], \[16, 16\], \[8, 8\]\]"):
        SAM_SIDES[family](config)


@pytest.mark.parametrize("family", ["sam", "sam_hq", "efficienttam"])
@pytest.mark.parametrize(
    "name, value, said",
    [("image_size", 256, r"\(256, 16\), the prompt encoder's \(128, 16\)"), ("output_channels", 64, "64.*32")],
)
def test_vits_that_do_not_fit_are_refused(family, name, value, said):
    config = CONFIGS[family]()
    setattr(config.vision_config, name, value)
    with pytest.raises(InputError, match=said):
        SAM_SIDES[family](config)


# --------------------------------------------------------------------------------- parts, tying, saving, precision


class WholeConfig(PreTrainedConfig):
    model_type = "whole_of_sam_side"
    sub_configs_defaults = {"sam_config": SubConfigSpec(config_class=AutoConfig, model_type="sam2")}

    sam_config: PreTrainedConfig | None = None


class Whole(PreTrainedModel):
    """What ovsam's own models do with a side, and nothing more."""

    config: WholeConfig

    def __init__(self, config, part="all"):
        super().__init__(config)
        self.sam = SAM_SIDES[config.sam_config.model_type](config.sam_config, part)
        self.post_init()


def whole(config):
    return randomise(Whole(WholeConfig(sam_config=config)))


CODES = (
    "model.shared_image_embedding.positional_embedding",
    "model.prompt_encoder.shared_embedding.positional_embedding",
)


@pytest.fixture
def saved(family, tmp_path):
    model = whole(CONFIGS[family]())
    model.save_pretrained(tmp_path)
    return model, tmp_path


def assert_equal_outputs(one, other, prompts):
    other._apply(torch.clone)  # loaded tensors lie unaligned in the mapped file, which can change a sum's last bit
    with torch.no_grad():
        expected, actual = one.encode(images()), other.encode(images())
        assert torch.equal(actual.embedding, expected.embedding)
        expected, actual = one.decode(expected, **prompts), other.decode(actual, **prompts)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_parts_are_the_whole(saved):
    whole, folder = saved
    load = type(whole).from_pretrained
    vision, vision_info = load(folder, part="vision", output_loading_info=True)
    decoder, decoder_info = load(folder, part="decoder", output_loading_info=True)
    for part, info in ((vision, vision_info), (decoder, decoder_info)):
        assert not info["missing_keys"] and not info["mismatched_keys"]
        part.sam.load_state_dict(  # the same names, none missing
            {name: tensor for name, tensor in whole.sam.state_dict().items() if name in part.sam.state_dict()}
        )
    names = {name.split(".")[1] for name in vision.sam.state_dict()}
    assert names - {"mask_decoder", "no_memory_embedding"} == {"vision_encoder"}
    names = {name.split(".")[1] for name in decoder.sam.state_dict()}
    assert names == {"prompt_encoder", "mask_decoder", "shared_image_embedding"}
    with torch.no_grad():
        expected = whole.sam.decode(whole.sam.encode(images()), **points())
        decoded = decoder.sam.decode(vision.sam.encode(images()), **points())
    assert torch.equal(decoded.masks, expected.masks)
    assert torch.equal(decoder.sam.select_masks(decoded, False).iou, whole.sam.select_masks(expected, False).iou)


def test_prompts_and_image_share_one_position_code(saved, family):
    model, folder = saved
    reloaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    for side in (SAM_SIDES[family](model.config.sam_config), model.sam, reloaded.sam):  # random, saved, loaded
        image_code, prompt_code = (side.state_dict()[name] for name in CODES)
        assert torch.equal(image_code, prompt_code)
    assert_equal_outputs(model.sam, reloaded.sam, {**boxes(), **masks()})


def test_the_file_is_complete_for_transformers_own_class(saved):
    model, folder = saved
    with safe_open(folder / "model.safetensors", "pt") as file:
        weights = {name.removeprefix("sam.model."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # from_pretrained, since transformers itself renames SAM 3's tracker in files.
    load = model.sam.model_class.from_pretrained
    _, info = load(None, config=model.config.sam_config, state_dict=weights, output_loading_info=True)
    assert not any(info.values())


def test_one_name_of_the_position_code_is_enough(saved):
    """A file may hold only one of the two; transformers' tie must not leave the other to chance."""
    model, _ = saved
    weights = {f"sam.{name}": tensor for name, tensor in model.sam.state_dict().items()}
    for lost in CODES:
        some = {name: tensor for name, tensor in weights.items() if name != f"sam.{lost}"}
        reloaded = type(model).from_pretrained(None, config=model.config, state_dict=some)
        assert_equal_outputs(model.sam, reloaded.eval().sam, boxes())


@pytest.mark.parametrize("cast", ["load", "to", "half", "autocast"])
@torch.no_grad()
def test_half_precision_leaves_prompt_codes_exact(saved, cast):
    model, folder = saved
    exact = model.sam.model.prompt_encoder.shared_embedding.positional_embedding.clone()
    codes = []
    model.sam.model.prompt_encoder.register_forward_hook(lambda module, inputs, output: codes.append(output[0]))
    model.sam.decode(model.sam.encode(images()), **boxes())
    if cast == "load":
        half = type(model).from_pretrained(folder, dtype=torch.bfloat16)
        half.sam.model.prompt_encoder.register_forward_hook(lambda module, inputs, output: codes.append(output[0]))
    else:
        half = {"to": lambda: model.to(torch.bfloat16), "half": model.bfloat16, "autocast": lambda: model}[cast]()
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        decoded = half.sam.decode(half.sam.encode(images()), **{name: box.double() for name, box in boxes().items()})
    assert decoded.masks.isfinite().all() and decoded.masks.dtype == torch.bfloat16
    assert torch.equal(half.sam.model.prompt_encoder.shared_embedding.positional_embedding, exact)
    assert torch.equal(half.sam.model.shared_image_embedding.positional_embedding, exact)
    # What is left is the rounding of the learned corner embeddings; bf16 coordinates would be off by 0.1 and more.
    assert (codes[1] - codes[0]).abs().max() < 0.01


def test_moves_reach_the_position_code(family):
    moved = build(family).to("meta")
    assert all(tensor.is_meta for tensor in moved.state_dict().values())


def test_trunks_with_non_persistent_buffers_survive_loading(tmp_path):
    """timm computes them at construction, and from_pretrained leaves uninitialised memory in their place."""
    config = edgetam_config("test_coatnet", (128, 96, 64, 32), img_size=SIZE)
    model = whole(config)
    assert dict(model.named_non_persistent_buffers())
    model.save_pretrained(tmp_path)
    assert_equal_outputs(model.sam, Whole.from_pretrained(tmp_path).sam, boxes())


def test_weights_load_strictly_into_the_video_model():
    config = edgetam_config("mobilenetv4_conv_small", (960, 96, 64, 32))
    side = SAM_SIDES["edgetam"](config)
    video = EdgeTamVideoModel(
        EdgeTamVideoConfig(
            vision_config=config.vision_config.to_dict(),
            prompt_encoder_config=config.prompt_encoder_config.to_dict(),
            mask_decoder_config=config.mask_decoder_config.to_dict(),
            image_size=SIZE,
            memory_attention_hidden_size=C,
            memory_encoder_hidden_size=C,
        )
    )
    for name in ("vision_encoder", "prompt_encoder", "mask_decoder", "shared_image_embedding"):
        getattr(video, name).load_state_dict(getattr(side.model, name).state_dict(), strict=True)
    assert video.no_memory_embedding.shape == side.model.no_memory_embedding.shape
