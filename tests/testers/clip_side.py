"""Tests of every CLIP side: maps and unit embeddings of the described shapes, pooling, gradients, files, parts and half
precision."""

import copy
import re

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec

from ovsam.errors import InputError
from ovsam.modeling.clip import CLIP_SIDES


class EnclosingConfig(PreTrainedConfig):
    model_type = "enclosing"
    sub_configs_defaults = {"clip_config": SubConfigSpec(config_class=AutoConfig, model_type="clip")}

    clip_config: PreTrainedConfig | None = None


class Enclosing(PreTrainedModel):
    """A model that holds a side, as the models of ovsam do."""

    config: EnclosingConfig

    def __init__(self, config, part="all"):
        super().__init__(config)
        self.clip = CLIP_SIDES[config.clip_config.model_type](config.clip_config, part=part)
        self.adapter = torch.nn.Linear(3, 3)
        self.post_init()


def make_inputs(side):
    """Pixels of two images, three phrases of different lengths, and two masks for each image."""
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.randn(2, 3, side.image_size, side.image_size, generator=generator)
    input_ids = torch.randint(1, 62, (3, side.max_text_length), generator=generator)
    input_ids[:, 0] = 62
    for row, end in enumerate((4, 7, side.max_text_length - 1)):
        input_ids[row, end:] = 0
        input_ids[row, end] = 63
    masks = torch.zeros(2, 2, 16, 16)
    masks[:, 0, 2:9, 4:16] = 1
    masks[:, 1, 5, 5] = 0.8
    return pixel_values, input_ids, masks


class ClipSideTester:
    text_padding = "longest"
    softmax = True
    checks_text_length = True  # whether the side itself raises an error for phrases over max_text_length
    bfloat16_cosine = 0.99

    @classmethod
    def config(cls) -> PreTrainedConfig:
        raise NotImplementedError

    @classmethod
    def stir(cls, side):
        """Towers start with many zeros (biases, layer scales), which would hide mistakes."""
        for parameter in side.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)

    @classmethod
    def make_side(cls):
        torch.manual_seed(0)
        config = cls.config()
        side = CLIP_SIDES[config.model_type](config).eval()
        with torch.no_grad():
            cls.stir(side)
        return side

    @torch.no_grad()
    def outputs(self, side, part="all"):
        pixel_values, input_ids, masks = make_inputs(side)
        found = {} if part == "vision" else {"text": side.encode_text(input_ids)}
        if part != "text":
            features = side.encode_image(pixel_values.to(next(side.parameters()).dtype))
            found |= {"regions": side.pool(features, masks=masks), "pool_map": features.pool_map}
            found |= {f"maps.{index}": level for index, level in enumerate(features.maps)}
        return found

    @pytest.fixture(scope="class")
    @classmethod
    def side(cls):
        return cls.make_side()

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, side, tmp_path_factory):
        """A model around the side, saved."""
        folder = tmp_path_factory.mktemp("clip-side")
        model = Enclosing(EnclosingConfig(clip_config=cls.config()))
        model.clip.load_state_dict(side.state_dict())
        model.save_pretrained(folder)
        return folder

    # ---- the contract

    def test_shapes(self, side):
        found = self.outputs(side)
        maps = [found[f"maps.{index}"] for index in range(len(side.channels))]
        assert tuple(level.shape[1] for level in maps) == side.channels
        assert tuple(side.image_size // level.shape[-1] for level in maps) == side.strides
        assert found["text"].shape == (3, side.embed_dim) and found["regions"].shape == (2, 2, side.embed_dim)
        for name in ("text", "regions"):
            torch.testing.assert_close(found[name].norm(dim=-1), torch.ones(found[name].shape[:-1]))
        assert len(side.image_mean) == len(side.image_std) == 3
        assert (side.softmax, side.text_padding) == (self.softmax, self.text_padding)

    @torch.no_grad()
    def test_padding_of_phrases(self, side):
        """It changes nothing where it may be cut off, and is required where the tower reads it."""
        input_ids = make_inputs(side)[1][:1]
        whole = side.encode_text(input_ids, (input_ids != 0).long())
        if self.text_padding == "max_length":
            with pytest.raises(InputError, match=f"padded to {side.max_text_length} tokens, not 5"):
                side.encode_text(input_ids[:, :5])
        else:
            torch.testing.assert_close(side.encode_text(input_ids[:, :5]), whole, rtol=0, atol=1e-6)

    def test_a_phrase_over_the_limit_raises_an_error(self, side):
        if self.checks_text_length:
            limit = side.max_text_length
            with pytest.raises(ValueError, match=str(limit)):
                side.encode_text(torch.ones(1, limit + 1, dtype=torch.long))

    def test_gradients_reach_the_image_through_maps_and_regions(self, side):
        pixel_values, _, masks = make_inputs(side)
        features = side.encode_image(pixel_values.requires_grad_())
        for output in (*features.maps, side.pool(features, masks=masks)[..., 0]):
            (gradient,) = torch.autograd.grad(output.sum(), pixel_values, retain_graph=True)
            assert gradient.abs().max() > 0

    @torch.no_grad()
    def test_dense_equals_pooling_each_location(self, side):
        features = side.encode_image(make_inputs(side)[0])
        dense = side.dense(features)
        assert dense.shape == (2, side.embed_dim, *features.pool_map.shape[-2:])
        torch.testing.assert_close(dense.norm(dim=1), torch.ones(2, *dense.shape[-2:]))
        torch.testing.assert_close(dense, self.pooled_locations(side, features, dense.shape[-2:]), rtol=0, atol=1e-6)

    def pooled_locations(self, side, features, size):
        cells = torch.eye(size[0] * size[1]).unflatten(1, size).expand(2, -1, -1, -1)
        return side.pool(features, masks=cells).mT.unflatten(2, size)

    # ---- files, parts, precision; buffers that are not saved are uninitialised memory after from_pretrained

    def test_the_configuration_survives_a_dictionary(self):
        config = self.config()
        assert AutoConfig.for_model(**copy.deepcopy(config.to_dict())).to_dict() == config.to_dict()

    def test_outputs_survive_save_and_load(self, side, folder):
        loaded, report = Enclosing.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        found = self.outputs(loaded.clip)
        for name, expected in self.outputs(side).items():
            torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6, msg=name)

    @pytest.mark.parametrize("part", ["vision", "text"])
    def test_a_part_loads_from_the_whole_and_gives_the_same(self, side, folder, part):
        loaded, report = Enclosing.from_pretrained(folder, part=part, output_loading_info=True)
        assert not report["missing_keys"]
        other = r"\b(text|text_model)\." if part == "vision" else r"\b(visual|vision_model)\."
        assert any(re.search(other, name) for name in side.state_dict())
        assert not any(re.search(other, name) for name in loaded.state_dict())
        for name, found in self.outputs(loaded.clip, part).items():
            torch.testing.assert_close(found, self.outputs(side)[name], rtol=0, atol=1e-6, msg=name)

    def test_bfloat16(self, side, folder):
        loaded = Enclosing.from_pretrained(folder, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
        found, expected = self.outputs(loaded.clip), self.outputs(side)
        for name in ("text", "regions"):
            assert found[name].dtype == torch.bfloat16
            assert (found[name].float() * expected[name]).sum(-1).min() > self.bfloat16_cosine, name
