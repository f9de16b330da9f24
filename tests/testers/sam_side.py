"""Tests of every SAM side: masks of its own library, files, parts, half precision, and errors about invalid prompts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from common import GRID, SIZE, C, sam_config
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.models.sam2.modeling_sam2 import Sam2MaskDecoder

from ovsam.errors import InputError
from ovsam.modeling.sam import SAM_SIDES, DecodedMasks

CODES = (
    "model.shared_image_embedding.positional_embedding",
    "model.prompt_encoder.shared_embedding.positional_embedding",
)


class WholeConfig(PreTrainedConfig):
    model_type = "whole_of_sam_side"
    sub_configs_defaults = {"sam_config": SubConfigSpec(config_class=AutoConfig, model_type="sam2")}

    sam_config: PreTrainedConfig | None = None


class Whole(PreTrainedModel):
    """A model that holds a side, as the models of ovsam do, and nothing more."""

    config: WholeConfig

    def __init__(self, config, part="all"):
        super().__init__(config)
        self.sam = SAM_SIDES[config.sam_config.model_type](config.sam_config, part)
        self.post_init()


def stir(module):
    """Move weights away from the small initial ones of transformers, with which masks hardly depend on prompts."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if "backbone" not in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return module.eval()


def build_side(config):
    return stir(SAM_SIDES[config.model_type](config))


def build_whole(config):
    return stir(Whole(WholeConfig(sam_config=config)))


def transformers_model(side):
    """The model of transformers with the weights of a side."""
    model = type(side.model)(side.model.config).eval()
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in side.state_dict().items()})
    return model


def repair_sam_hq(decoder):
    """transformers 5.23 upscales the image as it was before the decoder's transformer, with rows and columns swapped;
    SAM-HQ's own code, and transformers until 4.53, upscale the output of that transformer."""
    outputs = []
    decoder.transformer.register_forward_hook(lambda module, inputs, output: outputs.append(output[1]))
    decoder.upscale_conv1.register_forward_pre_hook(
        lambda module, inputs: (
            outputs.pop().transpose(2, 3).reshape(inputs[0].shape),
        )  # [B*P, 1, L, C] -> [.., C, h, w]
    )


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


def padded_points():
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
    "padded points": padded_points(),
    "no prompt": {},
}
REFUSED = [  # prompts that do not agree, and the message
    ({**boxes(), **points(p=2)}, r"input_points \[2, 2, 2, 2\].*input_boxes \[2, 3, 4\]"),
    (boxes(b=1), r"B = 2 images.*input_boxes \[1, 3, 4\]"),
    ({"input_boxes": boxes()["input_boxes"][0]}, r"input_boxes \[B, P, 4\].*got input_boxes \[3, 4\]"),
    ({**points(), "input_labels": points(n=1)["input_labels"]}, r"the same P and N.*input_labels \[2, 3, 1\]"),
    ({**boxes(), **masks(p=1)}, r"input_masks \[2, 1, 32, 32\]"),
]


def assert_same_masks(decoded, expected, prompts=slice(None)):
    torch.testing.assert_close(decoded.masks[:, prompts], expected.pred_masks, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoded.iou[:, prompts], expected.iou_scores, rtol=1e-4, atol=1e-4)
    if "object_score_logits" in expected:
        object_logits = decoded.object_logits[:, prompts]
        torch.testing.assert_close(object_logits, expected.object_score_logits, rtol=1e-4, atol=1e-4)
    else:
        assert decoded.object_logits is None


def assert_equal_outputs(one, other, prompts):
    other._apply(torch.clone)  # loaded tensors lie unaligned in the mapped file, which can change a sum's last bit
    with torch.no_grad():
        expected, actual = one.encode(images()), other.encode(images())
        assert torch.equal(actual.embedding, expected.embedding)
        expected, actual = one.decode(expected, **prompts), other.decode(actual, **prompts)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


class SamSideTester:
    family: str  # the model_type of its configuration, a key of SAM_SIDES
    pyramid = True  # whether it has SAM 2's three maps, or a plain ViT's one
    finer_maps = 2  # of the image, which its mask decoder reads besides the embedding
    by_stability = True  # whether its configuration chooses the mask by stability, as SAM 2 does

    @classmethod
    def config(cls):
        return sam_config(cls.family)

    @classmethod
    def own_model(cls, side):
        """The model of its own library with the weights of the side, called as those of transformers."""
        return transformers_model(side)

    @pytest.fixture(scope="class")
    @classmethod
    def side(cls):
        return build_side(cls.config())

    @pytest.fixture(scope="class")
    @classmethod
    def own(cls, side):
        return cls.own_model(side)

    @pytest.fixture
    def saved(self, tmp_path):
        """A model around the side, and the folder that it was saved in."""
        model = build_whole(self.config())
        model.save_pretrained(tmp_path)
        return model, tmp_path

    # ---- encode and decode

    @torch.no_grad()
    def test_maps(self, side, own):
        features = side.encode(images())
        if self.pyramid:
            high_res_0, high_res_1, embedding = own.get_image_embeddings(images())
            torch.testing.assert_close(features.embedding, embedding)
            torch.testing.assert_close(features.high_res, (high_res_0, high_res_1))
            raw = own.vision_encoder(images()).fpn_hidden_states
        else:
            raw = [side.model.vision_encoder(images()).last_hidden_state]
            finer = [(2, C // 8, 4 * GRID, 4 * GRID)] * self.finer_maps
            assert [tuple(level.shape) for level in features.high_res] == finer
        torch.testing.assert_close(features.pyramid, tuple(raw))
        shapes = zip(side.pyramid_channels, [SIZE // stride for stride in side.pyramid_strides], strict=True)
        assert [tuple(level.shape[1:]) for level in raw] == [(channels, cells, cells) for channels, cells in shapes]
        assert side.pyramid_strides == ((4, 8, 16) if self.pyramid else (16,))
        assert (side.image_size, side.width, side.finer_maps) == (SIZE, C, self.finer_maps)

    def test_gradients_reach_the_image_encoder(self):
        side = build_side(self.config())
        side.decode(side.encode(images()), **boxes()).masks.square().mean().backward()
        assert next(side.model.vision_encoder.parameters()).grad.abs().max() > 0

    @pytest.mark.parametrize("multimask_output", [True, False])
    @pytest.mark.parametrize("prompts", PROMPTS)
    @torch.no_grad()
    def test_masks(self, side, own, prompts, multimask_output):
        expected = own(images(), multimask_output=multimask_output, **PROMPTS[prompts])
        decoded = side.select_masks(side.decode(side.encode(images()), **PROMPTS[prompts]), multimask_output)
        assert_same_masks(decoded, expected)

    @pytest.mark.parametrize("size", [4 * GRID, SIZE])
    @pytest.mark.parametrize("others", [boxes(), points(), {}], ids=["boxes", "points", "alone"])
    @torch.no_grad()
    def test_mask_prompts(self, side, own, others, size):
        """Each prompt may have a mask of its own; transformers takes one mask for all, so it is asked one by one."""
        given = masks(size=size)["input_masks"]
        # SAM 1 of transformers does not resize them.
        shrunk = F.interpolate(given, (4 * GRID, 4 * GRID), mode="bilinear", antialias=True)
        decoded = side.select_masks(side.decode(side.encode(images()), **others, input_masks=given), True)
        for i in range(3):
            one = {name: prompt[:, i : i + 1] for name, prompt in (others | {"input_masks": shrunk}).items()}
            assert_same_masks(decoded, own(images(), multimask_output=True, **one), slice(i, i + 1))

    def test_unstable_masks_are_replaced_by_the_best_of_the_others(self, side):
        """The token of the chosen mask is chosen with it."""
        torch.manual_seed(5)
        masks, iou, tokens = torch.randn(2, 3, 4, 8, 8), torch.rand(2, 3, 4), torch.randn(2, 3, 4, C)
        masks[0] *= 0.01  # hardly past the threshold: unstable
        masks[1] *= 1000
        masks[0, 2, 0] = -1.0  # empty: stable
        decoded = DecodedMasks(masks, iou, tokens, torch.randn(2, 3, 1))
        selected = side.select_masks(decoded, False, by_stability=None if self.by_stability else True)
        reference = Sam2MaskDecoder(sam_config("sam2").mask_decoder_config)
        expected_masks, expected_iou = reference._dynamic_multimask_via_stability(masks, iou)
        assert torch.equal(selected.masks, expected_masks) and torch.equal(selected.iou, expected_iou)
        best = (iou[..., 1:].argmax(-1) + 1).tolist()
        choice = [[best[0][0], best[0][1], 0], [0, 0, 0]]
        for b, p in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
            assert torch.equal(selected.tokens[b, p, 0], tokens[b, p, choice[b][p]])
        without = side.select_masks(decoded, False, by_stability=False)
        by_default = (copy.deepcopy(side).train() if self.by_stability else side).select_masks(decoded, False)
        assert torch.equal(without.tokens, tokens[:, :, :1]) and torch.equal(by_default.tokens, tokens[:, :, :1])

    def test_three_masks_are_all_but_the_first(self, side):
        torch.manual_seed(5)
        decoded = DecodedMasks(torch.randn(2, 3, 4, 8, 8), torch.rand(2, 3, 4), torch.randn(2, 3, 4, C), None)
        three, order = side.select_masks(decoded, True), self.order_of_three(decoded.iou[:, :, 1:])
        assert torch.equal(three.tokens, decoded.tokens[:, :, 1:].take_along_dim(order[..., None], 2))
        assert torch.equal(three.masks, decoded.masks[:, :, 1:].take_along_dim(order[..., None, None], 2))

    def order_of_three(self, iou):
        return torch.arange(3).expand_as(iou)

    # ---- mistakes

    @pytest.mark.parametrize("prompts, message", REFUSED)
    def test_prompts_that_do_not_agree_raise_an_error(self, side, prompts, message):
        with pytest.raises(InputError, match=message):
            side.decode(side.encode(images()), **prompts)

    @torch.no_grad()
    def test_missing_finer_maps_raise_an_error_and_further_ones_are_ignored(self, side):
        features = side.encode(images())
        expected = side.decode(features, **boxes()).masks
        features.high_res = (*features.high_res, *[torch.randn(2, C // 8, 4 * GRID, 4 * GRID)] * 2)
        assert torch.equal(side.decode(features, **boxes()).masks, expected)
        features.high_res = ()
        if self.finer_maps:
            with pytest.raises(InputError, match=f"reads {self.finer_maps} maps of high_res; the features have 0"):
                side.decode(features, **boxes())

    def test_images_of_another_size_raise_an_error(self, side):
        with pytest.raises(InputError, match="128 x 128 pixels; got 128 x 96"):
            side.encode(images()[..., :96])
        config = self.config()
        config.prompt_encoder_config.image_size = [SIZE, SIZE]
        with pytest.raises(InputError, match="side of a square"):
            SAM_SIDES[self.family](config)

    def test_numbers_that_do_not_fit_raise_an_error(self):
        if self.pyramid:
            wrong = {"backbone_feature_sizes": [[256, 256], [128, 128], [64, 64]]}  # transformers' default, 1024 px
            refused = [(wrong, r"must be \[\[32, 32\], \[16, 16\], \[8, 8\]\]")]
        else:
            refused = [({"image_size": 256}, r"\(256, 16\), the prompt encoder's \(128, 16\)")]
            refused += [({"output_channels": 64}, "64.*32")]
        for wrong, message in refused:
            config = self.config()
            for name, value in wrong.items():
                setattr(config.vision_config, name, value)
            with pytest.raises(InputError, match=message):
                SAM_SIDES[self.family](config)

    # ---- parts, files, precision

    def test_the_configuration_survives_a_dictionary(self):
        config = self.config()
        again = AutoConfig.for_model(**config.to_dict())
        assert isinstance(again, PreTrainedConfig) and again.to_dict() == config.to_dict()

    def test_parts_load_from_the_whole_and_give_the_same(self, saved):
        whole, folder = saved
        vision, vision_info = Whole.from_pretrained(folder, part="vision", output_loading_info=True)
        decoder, decoder_info = Whole.from_pretrained(folder, part="decoder", output_loading_info=True)
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

    def test_prompts_and_image_share_one_position_code(self, saved):
        model, folder = saved
        reloaded, info = Whole.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        for side in (SAM_SIDES[self.family](model.config.sam_config), model.sam, reloaded.sam):  # random, saved, loaded
            image_code, prompt_code = (side.state_dict()[name] for name in CODES)
            assert torch.equal(image_code, prompt_code)
        assert_equal_outputs(model.sam, reloaded.sam, {**boxes(), **masks()})

    def test_the_file_is_complete_for_the_class_of_transformers(self, saved):
        model, folder = saved
        with safe_open(folder / "model.safetensors", "pt") as file:
            weights = {name.removeprefix("sam.model."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        # from_pretrained, since transformers itself renames SAM 3's tracker in files.
        load = model.sam.model_class.from_pretrained
        _, info = load(None, config=model.config.sam_config, state_dict=weights, output_loading_info=True)
        assert not any(info.values())

    def test_one_name_of_the_position_code_is_enough(self, saved):
        """A file may hold only one of the two; the tie in transformers must not leave the other random."""
        model, _ = saved
        weights = {f"sam.{name}": tensor for name, tensor in model.sam.state_dict().items()}
        for lost in CODES:
            some = {name: tensor for name, tensor in weights.items() if name != f"sam.{lost}"}
            reloaded = Whole.from_pretrained(None, config=model.config, state_dict=some)
            assert_equal_outputs(model.sam, reloaded.eval().sam, boxes())

    @pytest.mark.parametrize("cast", ["load", "to", "autocast"])
    @torch.no_grad()
    def test_half_precision_leaves_prompt_codes_exact(self, saved, cast):
        model, folder = saved
        exact = model.sam.model.prompt_encoder.shared_embedding.positional_embedding.clone()
        codes = []
        model.sam.model.prompt_encoder.register_forward_hook(lambda module, inputs, output: codes.append(output[0]))
        model.sam.decode(model.sam.encode(images()), **boxes())
        half = model
        if cast == "load":
            half = Whole.from_pretrained(folder, dtype=torch.bfloat16)
            half.sam.model.prompt_encoder.register_forward_hook(lambda module, inputs, output: codes.append(output[0]))
        elif cast == "to":
            model.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
            decoded = half.sam.decode(
                half.sam.encode(images()), **{name: box.double() for name, box in boxes().items()}
            )
        assert decoded.masks.isfinite().all() and decoded.masks.dtype == torch.bfloat16
        assert torch.equal(half.sam.model.prompt_encoder.shared_embedding.positional_embedding, exact)
        assert torch.equal(half.sam.model.shared_image_embedding.positional_embedding, exact)
        # What is left is the rounding of the learned corner embeddings; bf16 coordinates would be off by 0.1 and more.
        assert (codes[1] - codes[0]).abs().max() < 0.01

    def test_moves_reach_the_position_code(self):
        moved = build_side(self.config()).to("meta")
        assert all(tensor.is_meta for tensor in moved.state_dict().values())
