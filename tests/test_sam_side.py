"""The SAM sides against transformers' own models, at tiny random size."""

import pytest
import torch
from safetensors import safe_open
from transformers import EdgeTamConfig, EdgeTamVideoConfig, EdgeTamVideoModel, PreTrainedModel, Sam2Config

from ovsam.errors import InputError
from ovsam.sam import SAM_SIDES, DecodedMasks

SIZE, C = 128, 32
GRID = SIZE // 16


def edgetam_config(architecture="test_efficientnet", channels=(64, 48, 32, 24), **args):
    backbone = {
        "model_type": "timm_wrapper",
        "architecture": architecture,
        "num_classes": 0,
        "model_args": {"in_chans": 3, "features_only": True, "out_indices": [1, 2, 3, 4], **args},
    }
    return EdgeTamConfig(
        vision_config={
            "backbone_config": backbone,
            "backbone_channel_list": list(channels),
            "backbone_feature_sizes": [[4 * GRID] * 2, [2 * GRID] * 2, [GRID] * 2],
            "fpn_hidden_size": C,
            "fpn_top_down_levels": [0, 1, 2, 3],
        },
        prompt_encoder_config={"hidden_size": C, "image_size": SIZE},
        mask_decoder_config={"hidden_size": C, "mlp_dim": 48, "num_attention_heads": 4, "iou_head_hidden_dim": 16},
    )


def sam2_config():
    backbone = {
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
    return Sam2Config(
        vision_config={
            "backbone_config": backbone,
            "backbone_channel_list": [64, 32, 16, 8],
            "backbone_feature_sizes": [[4 * GRID] * 2, [2 * GRID] * 2, [GRID] * 2],
            "fpn_hidden_size": C,
        },
        prompt_encoder_config={"hidden_size": C, "image_size": SIZE},
        mask_decoder_config={"hidden_size": C, "mlp_dim": 48, "num_attention_heads": 4, "iou_head_hidden_dim": 16},
    )


CONFIGS = {"sam2": sam2_config, "edgetam": edgetam_config}


def randomise(module):
    """Away from transformers' small initial weights, with which masks hardly depend on prompts."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if "backbone" not in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return module.eval()


@pytest.fixture(params=CONFIGS)
def side(request):
    return randomise(SAM_SIDES[request.param](CONFIGS[request.param]()))


@pytest.fixture
def stock(side):
    """transformers' model with the same weights."""
    model = type(side.model)(side.model.config).eval()
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in side.state_dict().items()})
    return model


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


def test_features_are_those_of_transformers(side, stock):
    features = side.encode(images())
    high_res_0, high_res_1, embedding = stock.get_image_embeddings(images())
    torch.testing.assert_close(features.embedding, embedding)
    torch.testing.assert_close(features.high_res, (high_res_0, high_res_1))
    for level, raw in enumerate(stock.vision_encoder(images()).fpn_hidden_states):
        torch.testing.assert_close(features.pyramid[level], raw)
        assert raw.shape[1:] == (side.pyramid_channels[level], *[SIZE // side.pyramid_strides[level]] * 2)
    assert (side.image_size, side.width, side.pyramid_strides) == (SIZE, C, (4, 8, 16))


def test_gradients_reach_the_image_encoder(side):
    decoded = side.decode(side.encode(images()), **boxes())
    decoded.masks.square().mean().backward()
    first = next(side.model.vision_encoder.parameters())
    assert first.grad.abs().max() > 0


@pytest.mark.parametrize("multimask_output", [True, False])
@pytest.mark.parametrize("prompts", PROMPTS)
@torch.no_grad()
def test_masks_are_those_of_transformers(side, stock, prompts, multimask_output):
    expected = stock(images(), multimask_output=multimask_output, **PROMPTS[prompts])
    decoded = side.select_masks(side.decode(side.encode(images()), **PROMPTS[prompts]), multimask_output)
    torch.testing.assert_close(decoded.masks, expected.pred_masks, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoded.iou, expected.iou_scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoded.object_logits, expected.object_score_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [4 * GRID, SIZE])
@torch.no_grad()
def test_mask_prompts_are_those_of_transformers_asked_one_by_one(side, stock, size):
    prompts = {**boxes(), **masks(size=size)}
    decoded = side.select_masks(side.decode(side.encode(images()), **prompts), True)
    for i in range(3):
        one = {name: prompt[:, i : i + 1] for name, prompt in prompts.items()}
        expected = stock(images(), multimask_output=True, **one)
        torch.testing.assert_close(decoded.masks[:, i : i + 1], expected.pred_masks, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(decoded.iou[:, i : i + 1], expected.iou_scores, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_mask_alone_is_a_prompt(side, stock):
    features = side.encode(images())
    decoded = side.select_masks(side.decode(features, **masks()), True)
    for i in range(3):
        expected = stock(images(), input_masks=masks()["input_masks"][:, i : i + 1])
        torch.testing.assert_close(decoded.masks[:, i : i + 1], expected.pred_masks, rtol=1e-4, atol=1e-4)


def test_unstable_masks_give_way_to_the_best_of_the_others(side):
    """Whichever mask is chosen, its token is."""
    torch.manual_seed(5)
    masks, iou, tokens = torch.randn(2, 3, 4, 8, 8), torch.rand(2, 3, 4), torch.randn(2, 3, 4, C)
    masks[0] *= 0.01  # hardly past the threshold: unstable
    masks[1] *= 1000
    masks[0, 2, 0] = -1.0  # empty: stable
    decoded = DecodedMasks(masks, iou, tokens, torch.randn(2, 3, 1))
    selected = side.select_masks(decoded, False)
    expected_masks, expected_iou = side.model.mask_decoder._dynamic_multimask_via_stability(masks, iou)
    assert torch.equal(selected.masks, expected_masks)
    assert torch.equal(selected.iou, expected_iou)
    best = (iou[..., 1:].argmax(-1) + 1).tolist()
    choice = [[best[0][0], best[0][1], 0], [0, 0, 0]]
    for b, p in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        assert torch.equal(selected.tokens[b, p, 0], tokens[b, p, choice[b][p]])
    assert torch.equal(side.train().select_masks(decoded, False).tokens, tokens[:, :, :1])
    assert torch.equal(side.select_masks(decoded, True).tokens, tokens[:, :, 1:])


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


@pytest.mark.parametrize("family", CONFIGS)
def test_configurations_that_do_not_fit_are_refused(family):
    config = CONFIGS[family]()
    config.prompt_encoder_config.image_size = [SIZE, SIZE]
    with pytest.raises(InputError, match="side of a square"):
        SAM_SIDES[family](config)
    config = CONFIGS[family]()
    config.vision_config.backbone_feature_sizes = [[256, 256], [128, 128], [64, 64]]  # transformers' default, 1024 px
    with pytest.raises(InputError, match=r"must be \[\[32, 32\], \[16, 16\], \[8, 8\]\]"):
        SAM_SIDES[family](config)


# --------------------------------------------------------------------------------- parts, tying, saving, precision


class Wrapper(PreTrainedModel):
    """What ovsam's own models do with a side, and nothing more."""

    def __init__(self, config, part="all"):
        super().__init__(config)
        self.sam = SAM_SIDES[config.model_type](config, part)
        self.post_init()


class Sam2Wrapper(Wrapper):
    config: Sam2Config


class EdgeTamWrapper(Wrapper):
    config: EdgeTamConfig


WRAPPERS = {"sam2": Sam2Wrapper, "edgetam": EdgeTamWrapper}
CODES = (
    "model.shared_image_embedding.positional_embedding",
    "model.prompt_encoder.shared_embedding.positional_embedding",
)


@pytest.fixture(params=CONFIGS)
def saved(request, tmp_path):
    model = randomise(WRAPPERS[request.param](CONFIGS[request.param]()))
    model.save_pretrained(tmp_path)
    return model, tmp_path


def assert_equal_outputs(one, other, prompts):
    other._apply(torch.clone)  # loaded tensors lie unaligned in the mapped file, which can change a sum's last bit
    with torch.no_grad():
        expected, actual = one.encode(images()), other.encode(images())
        assert torch.equal(actual.embedding, expected.embedding)
        expected, actual = one.decode(expected, **prompts), other.decode(actual, **prompts)
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
    assert names == {"vision_encoder", "mask_decoder", "no_memory_embedding"}
    names = {name.split(".")[1] for name in decoder.sam.state_dict()}
    assert names == {"prompt_encoder", "mask_decoder", "shared_image_embedding"}
    with torch.no_grad():
        expected = whole.sam.decode(whole.sam.encode(images()), **points())
        decoded = decoder.sam.decode(vision.sam.encode(images()), **points())
    assert torch.equal(decoded.masks, expected.masks)
    assert torch.equal(decoder.sam.select_masks(decoded, False).iou, whole.sam.select_masks(expected, False).iou)


def test_prompts_and_image_share_one_position_code(saved):
    model, folder = saved
    reloaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    for side in (SAM_SIDES[model.config.model_type](model.config), model.sam, reloaded.sam):  # random, saved, loaded
        image_code, prompt_code = (side.state_dict()[name] for name in CODES)
        assert torch.equal(image_code, prompt_code)
    assert_equal_outputs(model.sam, reloaded.sam, {**boxes(), **masks()})


def test_the_file_is_complete_for_transformers_own_class(saved):
    model, folder = saved
    with safe_open(folder / "model.safetensors", "pt") as file:
        weights = {name.removeprefix("sam.model."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model.sam.model_class(model.config).load_state_dict(weights, strict=True)


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


def test_moves_reach_the_position_code(side):
    moved = side.to("meta")
    assert all(tensor.is_meta for tensor in moved.state_dict().values())


def test_trunks_with_non_persistent_buffers_survive_loading(tmp_path):
    """timm computes them at construction, and from_pretrained leaves uninitialised memory in their place."""
    config = edgetam_config("test_coatnet", (128, 96, 64, 32), img_size=SIZE)
    model = randomise(EdgeTamWrapper(config))
    assert dict(model.named_non_persistent_buffers())
    model.save_pretrained(tmp_path)
    assert_equal_outputs(model.sam, EdgeTamWrapper.from_pretrained(tmp_path).sam, boxes())


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
