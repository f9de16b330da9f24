"""The encoder of SAM 2 in strips of windows, beside transformers' own."""

import pytest
import torch
from transformers import Sam2HieraDetConfig, Sam2VisionConfig, Sam2VisionModel

from ovsam.modeling.sam import hiera

# Windows of SAM 2.1's base and large trunks; 72 positions are a multiple of 8 and 4, and not of 14, 16 and 7.
WINDOWS = {"tiny": [8, 4, 14, 7], "large": [8, 4, 16, 8]}


@pytest.fixture(params=WINDOWS)
def encoder(request):
    trunk = {
        "image_size": [288, 288],
        "hidden_size": 16,
        "blocks_per_stage": [1, 2, 3, 2],
        "embed_dim_per_stage": [16, 32, 64, 128],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": WINDOWS[request.param],
        "global_attention_blocks": [4],
        "window_positional_embedding_background_size": [7, 7],
    }
    torch.manual_seed(0)
    trunk = Sam2HieraDetConfig(**trunk)
    config = Sam2VisionConfig(backbone_config=trunk, backbone_channel_list=[128, 64, 32, 16], fpn_hidden_size=32)
    model = Sam2VisionModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("strip", [1, 500, 10**6])
@torch.no_grad()
def test_maps_equal_those_of_transformers(encoder, strip, monkeypatch):
    monkeypatch.setattr(hiera, "STRIP", strip)
    pixels = torch.randn(2, 3, 288, 288)
    expected = encoder(pixels, return_dict=True).fpn_hidden_states
    maps = hiera.hiera_pyramid(encoder, pixels)
    assert [each.shape for each in maps] == [each.shape for each in expected]
    for one, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_bfloat16(encoder):
    pixels, encoder = torch.randn(1, 3, 288, 288).bfloat16(), encoder.bfloat16()
    expected = encoder(pixels, return_dict=True).fpn_hidden_states
    for one, other in zip(hiera.hiera_pyramid(encoder, pixels), expected, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
