"""The rearranged mask decoder against transformers' own: in float64, so that only an exact rearrangement passes."""

import pytest
import torch
from transformers.models.edgetam.configuration_edgetam import EdgeTamMaskDecoderConfig
from transformers.models.edgetam.modeling_edgetam import EdgeTamMaskDecoder
from transformers.models.sam2.configuration_sam2 import Sam2MaskDecoderConfig
from transformers.models.sam2.modeling_sam2 import Sam2MaskDecoder

from ovsam.sam import decode

FAMILIES = {"sam2": (Sam2MaskDecoder, Sam2MaskDecoderConfig), "edgetam": (EdgeTamMaskDecoder, EdgeTamMaskDecoderConfig)}
C, H, W = 32, 6, 4  # not square, so that a swap of rows and columns shows


def build(family="sam2", **options):
    torch.manual_seed(0)
    module, config = FAMILIES[family]
    config = config(hidden_size=C, mlp_dim=48, num_attention_heads=4, iou_head_hidden_dim=16, **options)
    config._attn_implementation = "sdpa"
    decoder = module(config).double().eval()
    for parameter in decoder.parameters():  # norms and biases must matter too
        parameter.data += 0.2 * torch.randn_like(parameter)
    return decoder


def draw(b=2, p=5, t=3, dense=(1, 1, C, 1, 1)):
    torch.manual_seed(1)
    shapes = (b, C, H, W), (1, C, H, W), (b, C // 8, 4 * H, 4 * W), (b, C // 4, 2 * H, 2 * W), (b, p, t, C), dense
    embedding, position, s0, s1, sparse, dense = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [embedding, position, (s0, s1), sparse, dense]


def reference(decoder, embedding, position, high_res, sparse, dense, multimask_output=True):
    """transformers' decoder, which takes one dense embedding for each image."""
    return decoder(
        image_embeddings=embedding,
        image_positional_embeddings=position.expand(len(embedding), -1, -1, -1),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense.expand(len(embedding), -1, -1, -1, -1)[:, 0].expand_as(embedding),
        multimask_output=multimask_output,
        high_resolution_features=list(high_res),
    )


def one_at_a_time(decoder, embedding, position, high_res, sparse, dense):
    """Every prompt in a call of its own, so that each may have its own dense embedding."""
    b, p = sparse.shape[:2]
    dense = dense.expand(b, p, *embedding.shape[1:])
    calls = [
        reference(decoder, embedding, position, high_res, sparse[:, i : i + 1], dense[:, i : i + 1]) for i in range(p)
    ]
    return [torch.cat(part, dim=1) for part in zip(*calls, strict=True)]


def assert_same(decoded, expected, kept=slice(1, None), **tolerance):
    masks, iou, tokens, object_logits = expected
    for actual, wanted in (
        (decoded.masks[:, :, kept], masks),
        (decoded.iou[:, :, kept], iou),
        (decoded.tokens[:, :, kept], tokens),
        (decoded.object_logits, object_logits),
    ):
        torch.testing.assert_close(actual, wanted, **(tolerance or {"rtol": 1e-9, "atol": 1e-9}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 2 * C * H * W, 11 * C * H * W, 2**20])  # one prompt, two, two images, everything
def test_masks_are_those_of_transformers(family, chunk, monkeypatch):
    monkeypatch.setattr(decode, "CPU_CHUNK", chunk)
    decoder, inputs = build(family, dynamic_multimask_via_stability=False), draw(b=3)
    decoded = decode.decode_masks(decoder, *inputs)
    assert decoded.masks.shape == (3, 5, 4, 4 * H, 4 * W)
    assert_same(decoded, reference(decoder, *inputs))
    assert_same(decoded, reference(decoder, *inputs, multimask_output=False), kept=slice(0, 1))


@pytest.mark.parametrize("chunk", [1, 4 * C * H * W, 2**20])
@pytest.mark.parametrize("dense", [(2, 5, C, H, W), (1, 5, C, H, W), (2, 1, C, H, W), (2, 5, C, 1, 1)])
def test_each_prompt_may_have_its_own_mask(dense, chunk, monkeypatch):
    monkeypatch.setattr(decode, "CPU_CHUNK", chunk)
    decoder, inputs = build(), draw(dense=dense)
    assert_same(decode.decode_masks(decoder, *inputs), one_at_a_time(decoder, *inputs))


def test_deeper_decoders_and_memory_formats():
    decoder, inputs = build(num_hidden_layers=3), draw(b=1, p=2, t=9)
    expected = reference(decoder, *inputs)
    inputs[0] = inputs[0].to(memory_format=torch.channels_last)
    inputs[2] = tuple(feature.to(memory_format=torch.channels_last) for feature in inputs[2])
    assert_same(decode.decode_masks(decoder, *inputs), expected)


@pytest.mark.parametrize("chunk", [3 * C * H * W, 2**20])
@pytest.mark.parametrize("dense", [(1, 1, C, 1, 1), (2, 4, C, H, W)])
def test_gradients_are_those_of_transformers(dense, chunk, monkeypatch):
    monkeypatch.setattr(decode, "CPU_CHUNK", chunk)
    decoder, inputs = build(), draw(p=4, dense=dense)
    leaves = [inputs[0], *inputs[2], inputs[3], inputs[4]]
    for leaf in leaves:
        leaf.requires_grad_()
    # conv_s0 and conv_s1 belong to the image side.
    leaves += [parameter for name, parameter in decoder.named_parameters() if not name.startswith("conv_s")]

    def gradients(masks, iou, tokens, object_logits):
        torch.manual_seed(2)
        loss = sum((part * torch.randn_like(part)).sum() for part in (masks, iou, tokens, object_logits))
        return torch.autograd.grad(loss, leaves)

    decoded = decode.decode_masks(decoder, *inputs)
    decoded = decoded.masks[:, :, 1:], decoded.iou[:, :, 1:], decoded.tokens[:, :, 1:], decoded.object_logits
    gradients_here, expected = gradients(*decoded), gradients(*one_at_a_time(decoder, *inputs))
    for here, wanted in zip(gradients_here, expected, strict=True):
        torch.testing.assert_close(here, wanted, rtol=1e-7, atol=1e-7)


def test_half_precision_is_no_less_exact_than_transformers():
    decoder, inputs = build(), draw(p=8)
    exact = reference(decoder, *inputs)[0]
    decoder = decoder.bfloat16()
    inputs = [tuple(x.bfloat16() for x in part) if isinstance(part, tuple) else part.bfloat16() for part in inputs]
    stock_error = (reference(decoder, *inputs)[0].double() - exact).abs().mean()
    decoded = decode.decode_masks(decoder, *inputs)
    assert decoded.masks.dtype == torch.bfloat16
    assert (decoded.masks[:, :, 1:].double() - exact).abs().mean() < 1.2 * stock_error
