"""Our pass over the mask decoders against transformers' own, at the same weights, in double precision."""

import pytest
import torch
from testers.sam_side import repair_sam_hq
from transformers.models.edgetam.configuration_edgetam import EdgeTamMaskDecoderConfig
from transformers.models.edgetam.modeling_edgetam import EdgeTamMaskDecoder
from transformers.models.sam.configuration_sam import SamMaskDecoderConfig, SamPromptEncoderConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamMaskEmbedding
from transformers.models.sam2.configuration_sam2 import Sam2MaskDecoderConfig, Sam2PromptEncoderConfig
from transformers.models.sam2.modeling_sam2 import Sam2MaskDecoder, Sam2MaskEmbedding
from transformers.models.sam3_tracker.configuration_sam3_tracker import Sam3TrackerMaskDecoderConfig
from transformers.models.sam3_tracker.modeling_sam3_tracker import Sam3TrackerMaskDecoder
from transformers.models.sam_hq.configuration_sam_hq import SamHQMaskDecoderConfig, SamHQPromptEncoderConfig
from transformers.models.sam_hq.modeling_sam_hq import SamHQMaskDecoder, SamHQMaskEmbedding

from ovsam.modeling.sam import decode

FAMILIES = {
    "sam": (SamMaskDecoder, SamMaskDecoderConfig),
    "sam_hq": (SamHQMaskDecoder, SamHQMaskDecoderConfig),
    "sam2": (Sam2MaskDecoder, Sam2MaskDecoderConfig),
    "edgetam": (EdgeTamMaskDecoder, EdgeTamMaskDecoderConfig),
    "sam3_tracker": (Sam3TrackerMaskDecoder, Sam3TrackerMaskDecoderConfig),
}
MASK_EMBEDDINGS = {
    "sam": (SamMaskEmbedding, SamPromptEncoderConfig),
    "sam_hq": (SamHQMaskEmbedding, SamHQPromptEncoderConfig),
    "sam2": (Sam2MaskEmbedding, Sam2PromptEncoderConfig),
}
KINDS = ("sam", "sam_hq", "sam2")  # the other two have SAM 2's decoder under another name
C, H, W = 32, 6, 4  # not square, so that a swap of rows and columns shows
MAP = 8 * C * H * W  # bytes of one image embedding


def build(family="sam2", **options):
    torch.manual_seed(0)
    module, config = FAMILIES[family]
    config = config(hidden_size=C, mlp_dim=48, num_attention_heads=4, iou_head_hidden_dim=16, **options)
    config._attn_implementation = "sdpa"
    config.dynamic_multimask_via_stability = False  # which mask is chosen is tested with the sides
    decoder = module(config).double().eval()
    for parameter in decoder.parameters():  # norms and biases must matter too
        parameter.data += 0.2 * torch.randn_like(parameter)
    if family == "sam_hq":
        repair_sam_hq(decoder)
    return decoder


def draw(decoder, b=2, p=5, t=3, dense=(1, 1, C, 1, 1)):
    """The arguments of decode_masks after the decoder."""
    torch.manual_seed(1)
    fine = [(b, C // 8, 4 * H, 4 * W), (b, C // 4, 2 * H, 2 * W)]
    shapes = (b, C, H, W), (1, C, H, W), (b, p, t, C), dense, *fine
    embedding, position, sparse, dense, *high_res = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    high_res = tuple(high_res) if hasattr(decoder, "conv_s0") else ()
    return [embedding, position, high_res, sparse, dense, hq_features(decoder, embedding)]


def hq_features(decoder, embedding):
    """The image features of SAM-HQ's decoder, without the early ViT block."""
    if not hasattr(decoder, "hq_token"):
        return None
    return decoder.encoder_conv2(decoder.activation(decoder.encoder_norm(decoder.encoder_conv1(embedding))))


def reference(decoder, embedding, position, high_res, sparse, dense, fine=None, multimask_output=True):
    """transformers' decoder, which takes one dense embedding for each image: masks, iou, tokens, object logits."""
    more, tokens = {"high_resolution_features": list(high_res)} if high_res else {}, []
    if fine is not None:  # it computes them itself
        more |= {"hq_token_only": False, "intermediate_embeddings": None}
    hook = decoder.transformer.register_forward_hook(lambda module, inputs, outputs: tokens.append(outputs[0]))
    masks, iou, *rest = decoder(
        image_embeddings=embedding,
        image_positional_embeddings=position.expand(len(embedding), -1, -1, -1),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense.expand(len(embedding), -1, -1, -1, -1)[:, 0].expand_as(embedding),
        multimask_output=multimask_output,
        **more,
    )
    hook.remove()
    kept = slice(2, 5) if multimask_output else slice(1, 2)  # SAM 1 does not give them: behind the IoU token
    return [masks, iou, *(rest or [tokens[0][:, :, kept]])]


def one_at_a_time(decoder, embedding, position, high_res, sparse, dense, fine=None):
    """Every prompt in a call of its own, so that each may have its own dense embedding."""
    b, p = sparse.shape[:2]
    dense = dense.expand(b, p, *embedding.shape[1:])
    inputs = [[embedding, position, high_res, sparse[:, i : i + 1], dense[:, i : i + 1], fine] for i in range(p)]
    return [torch.cat(part, dim=1) for part in zip(*(reference(decoder, *one) for one in inputs), strict=True)]


def as_transformers_gives_them(family, decoded, multimask_output=True):
    masks, iou, tokens = decoded.masks, decoded.iou, decoded.tokens
    if family == "sam_hq":
        assert (masks.shape[2], iou.shape[2], tokens.shape[2]) == (5, 4, 5)
        masks, tokens = masks[:, :, :4] + masks[:, :, 4:], tokens[:, :, :4]
    kept = slice(1, None) if multimask_output else slice(0, 1)
    masks, iou, tokens = masks[:, :, kept], iou[:, :, kept], tokens[:, :, kept]
    if family == "sam_hq":
        iou, order = iou.sort(-1, descending=True)
        masks = masks.take_along_dim(order[..., None, None], 2)
    return [part for part in (masks, iou, tokens, decoded.object_logits) if part is not None]


def assert_same(actual, expected, **tolerance):
    for here, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(here, wanted, **(tolerance or {"rtol": 1e-9, "atol": 1e-9}))


@pytest.mark.parametrize("multimask_output", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", [1, 2 * MAP, 11 * MAP, 2**22])  # one prompt at once, two, two images, all
def test_masks_are_those_of_transformers(family, cache, multimask_output, monkeypatch):
    monkeypatch.setattr(decode, "CPU_CACHE", cache)
    decoder = build(family)
    inputs = draw(decoder, b=3)
    decoded = decode.decode_masks(decoder, *inputs)
    assert decoded.masks.shape == (3, 5, 5 if family == "sam_hq" else 4, 4 * H, 4 * W)
    actual = as_transformers_gives_them(family, decoded, multimask_output)
    assert_same(actual, reference(decoder, *inputs, multimask_output=multimask_output))


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("cache", [1, 4 * MAP, 2**22])
@pytest.mark.parametrize("dense", [(2, 5, C, H, W), (1, 5, C, H, W), (2, 1, C, H, W), (2, 5, C, 1, 1)])
def test_each_prompt_may_have_its_own_mask(family, dense, cache, monkeypatch):
    monkeypatch.setattr(decode, "CPU_CACHE", cache)
    decoder = build(family)
    inputs = draw(decoder, dense=dense)
    actual = as_transformers_gives_them(family, decode.decode_masks(decoder, *inputs))
    assert_same(actual, one_at_a_time(decoder, *inputs))


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("cache", [1, 2 * MAP, 2**22])
def test_mask_prompts_are_those_of_transformers(family, cache, monkeypatch):
    """Masks and gradients, whether the module of mask prompts is handed over or its output is."""
    monkeypatch.setattr(decode, "CPU_CACHE", cache)
    module, config = MASK_EMBEDDINGS[family]
    decoder, embed = build(family), module(config(hidden_size=C, mask_input_channels=16)).double()
    inputs, masks = draw(decoder), 4 * torch.randn(2, 5, 4 * H, 4 * W, dtype=torch.float64)
    leaves = [inputs[0].requires_grad_(), masks.requires_grad_(), *embed.parameters()]

    def run(dense):
        decoded = decode.decode_masks(decoder, *inputs[:4], dense, inputs[5])
        parts = [part for part in (decoded.masks, decoded.iou, decoded.tokens) if part is not None]
        torch.manual_seed(2)
        gradients = torch.autograd.grad(sum((part * torch.randn_like(part)).sum() for part in parts), leaves)
        return [*parts, *gradients]

    dense = embed(masks.flatten(0, 1)[:, None]).unflatten(0, (2, 5))
    assert_same(run(decode.MaskPrompts(masks, embed)), run(dense), rtol=1e-7, atol=1e-7)


def test_deeper_decoders_and_memory_formats():
    decoder = build(num_hidden_layers=3)
    inputs = draw(decoder, b=1, p=2, t=9)
    expected = reference(decoder, *inputs)
    inputs[0] = inputs[0].to(memory_format=torch.channels_last)
    inputs[2] = tuple(feature.to(memory_format=torch.channels_last) for feature in inputs[2])
    assert_same(as_transformers_gives_them("sam2", decode.decode_masks(decoder, *inputs)), expected)


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("cache", [3 * MAP, 2**22])
@pytest.mark.parametrize("dense", [(1, 1, C, 1, 1), (2, 4, C, H, W)])
def test_gradients_are_those_of_transformers(family, dense, cache, monkeypatch):
    monkeypatch.setattr(decode, "CPU_CACHE", cache)
    decoder = build(family)
    inputs = draw(decoder, p=4, dense=dense)
    leaves = [inputs[0], *inputs[2], inputs[3], inputs[4]]
    for leaf in leaves:
        leaf.requires_grad_()
    inputs[5] = hq_features(decoder, inputs[0])
    of_image = ("conv_s", "compress_vit")  # layers of the image side
    leaves += [parameter for name, parameter in decoder.named_parameters() if not name.startswith(of_image)]

    def gradients(parts):
        torch.manual_seed(2)
        return torch.autograd.grad(sum((part * torch.randn_like(part)).sum() for part in parts), leaves)

    here = gradients(as_transformers_gives_them(family, decode.decode_masks(decoder, *inputs)))
    assert_same(here, gradients(one_at_a_time(decoder, *inputs)), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("family", KINDS)
def test_half_precision_is_as_exact_as_transformers(family):
    decoder = build(family)
    inputs = draw(decoder, p=8)
    exact = reference(decoder, *inputs, multimask_output=False)[0]  # one mask: ranks of equal scores may change

    def halved(part):
        return tuple(map(halved, part)) if isinstance(part, tuple) else None if part is None else part.bfloat16()

    decoder, inputs = decoder.bfloat16(), [halved(part) for part in inputs]
    stock_error = (reference(decoder, *inputs, multimask_output=False)[0].double() - exact).abs().mean()
    decoded = decode.decode_masks(decoder, *inputs)
    assert decoded.masks.dtype == torch.bfloat16
    masks = as_transformers_gives_them(family, decoded, multimask_output=False)[0]
    assert (masks.double() - exact).abs().mean() < 1.3 * stock_error


# --------------------------------------------------------------------------------------- compiled, exported, in chunks


class Decoding(torch.nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, *inputs):
        return decode.decode_masks(self.decoder, *inputs).to_tuple()


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, dense", [("sam", (1, 1, C, 1, 1)), ("sam_hq", (2, 5, C, H, W)), ("sam2", (1, 1, C, 1, 1))]
)
def test_it_compiles_into_one_graph(family, dense):
    torch._dynamo.reset()
    module = Decoding(build(family))
    inputs = draw(module.decoder, dense=dense)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert_same(compiled(*inputs), module(*inputs))


@pytest.mark.slow
@pytest.mark.parametrize("family", KINDS)
def test_it_exports_for_any_number_of_prompts(family):
    module = Decoding(build(family))
    inputs = draw(module.decoder)
    shapes = None, None, (None,) * len(inputs[2]), {1: torch.export.Dim("prompts")}, None, None
    program = torch.export.export(module, tuple(inputs), dynamic_shapes=(shapes,), strict=False)
    for prompts in (5, 2):
        inputs[3] = draw(module.decoder, p=prompts)[3]
        assert_same(program.module()(*inputs), module(*inputs))


def test_chunks_fit_the_cache(monkeypatch):
    monkeypatch.setattr(decode, "CPU_CACHE", 10 * MAP)
    embedding = torch.zeros(2, C, H, W, dtype=torch.float64)
    assert decode.prompts_per_chunk(embedding) == 10
    assert decode.prompts_per_chunk(embedding.bfloat16()) == 40
    monkeypatch.setattr(decode, "CPU_CACHE", 1)
    assert decode.prompts_per_chunk(embedding) == 1


def test_chunks_fit_the_free_memory_of_an_accelerator(monkeypatch):
    free = 4 * decode.COPIES * MAP / decode.SHARE_OF_FREE_MEMORY
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - MAP, 10 * free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * MAP)  # a third of it is in use
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * MAP)
    embedding = torch.zeros(2, C, H, W, dtype=torch.float64)

    class OnCuda:
        device = torch.device("cuda:0")

        def __getitem__(self, index):
            return embedding[index]

        def element_size(self):
            return embedding.element_size()

    assert decode.prompts_per_chunk(OnCuda()) == 4
