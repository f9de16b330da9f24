"""The adapters by themselves: initial outputs, gradients, and files of their own."""

import pytest
import torch
from common import C, D, randomise
from torch.nn.functional import avg_pool2d, interpolate, normalize
from torch.testing import assert_close
from torchvision.ops import roi_align
from transformers import AutoConfig, AutoModel

from ovsam import Clip2SamAdapter, Clip2SamConfig, ConceptHead, ConceptHeadConfig, Sam2ClipAdapter, Sam2ClipConfig
from ovsam.modeling.adapters.common import box_rois, pool_from_pyramid

CHANNELS = [4, 6, 8, 10]
READ = {"in_channels": CHANNELS, "embed_dim": D, "width": 16}
ADAPTERS = {
    "clip2sam": (Clip2SamAdapter, Clip2SamConfig(**READ, token_dim=C)),
    "clip2sam without tokens": (Clip2SamAdapter, Clip2SamConfig(**READ)),
    "clip2sam with an MLP": (Clip2SamAdapter, Clip2SamConfig(**READ, mlp_dim=24)),
    "concepts": (ConceptHead, ConceptHeadConfig(**READ, mask_width=12)),
    "sam2clip": (Sam2ClipAdapter, Sam2ClipConfig(in_channels=CHANNELS, width=C, num_layers=2, num_heads=4)),
}
adapters = pytest.mark.parametrize("kind", ADAPTERS)


def build(kind):
    model_class, config = ADAPTERS[kind]
    return randomise(model_class(config))


def maps(b=2):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(b, c, 32 >> i, 32 >> i, generator=generator) for i, c in enumerate(CHANNELS))


def inputs_for(kind):
    if "clip2sam" not in kind:
        return {"maps": maps()}
    generator = torch.Generator().manual_seed(2)
    boxes = torch.tensor([[[8.0, 8, 40, 30], [0, 0, 128, 128], [60, 60, 61, 61]]]).repeat(2, 1, 1)
    masks = torch.rand(2, 3, 32, 32, generator=generator)
    tokens = {"tokens": torch.randn(2, 3, C, generator=generator)} if kind == "clip2sam" else {}
    return {"maps": maps(), "boxes": boxes, "masks": masks} | tokens


def outputs_of(model, kind):
    out = model(**inputs_for(kind))
    if torch.is_tensor(out):
        return {"embeds": out}
    tensors = {}
    for name, value in out.items():
        tensors |= {name: value} if torch.is_tensor(value) else {f"{name}.{i}": t for i, t in enumerate(value)}
    return tensors


@adapters
def test_each_adapter_is_saved_and_loaded(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "modeling_ovsam.py"}
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.config)
    assert config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path), "auto_map": config.auto_map}
    for loader in (type(model), AutoModel):
        loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is type(model) and not any(info.values())
        loaded._apply(torch.clone)  # out of the mapped file, where tensors lie unaligned
        with torch.no_grad():
            found = outputs_of(loaded, kind)
            for name, expected in outputs_of(model, kind).items():
                assert torch.equal(found[name], expected), name


@adapters
def test_gradients_reach_every_parameter(kind):
    model = build(kind).train()
    loss = sum(tensor.float().square().mean() for tensor in outputs_of(model, kind).values())
    if "clip2sam" in kind:
        words = normalize(torch.randn(4, D), dim=-1)
        loss = loss + model.logits(outputs_of(model, kind)["embeds"], words).square().mean()
    if kind == "concepts":
        out, boxes = model(maps()), torch.tensor([[[8.0, 8, 40, 30], [60, 60, 61, 61]]]).repeat(2, 1, 1)
        loss = loss + sum(mask.square().mean() for mask in model.mask_head(out.mask_features, boxes))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@adapters
def test_half_precision_works_and_keeps_boxes_exact(kind):
    model = build(kind)
    exact = outputs_of(model, kind)
    inputs = inputs_for(kind)
    inputs["maps"] = tuple(level.bfloat16() for level in inputs["maps"])
    inputs |= {"tokens": inputs["tokens"].bfloat16()} if "tokens" in inputs else {}
    out = model.bfloat16()(**inputs)
    found = {"embeds": out} if torch.is_tensor(out) else {n: t for n, t in out.items() if torch.is_tensor(t)}
    for name, tensor in found.items():
        error = (tensor.float() - exact[name]).abs().mean() / exact[name].abs().mean()
        assert error < 0.05, name
    if kind == "concepts":
        assert found["boxes"].dtype == found["logit_scale"].dtype == found["logit_shift"].dtype == torch.float32


# ------------------------------------------------------------------------------------------------ Clip2SamAdapter


@pytest.mark.parametrize("kind", ["clip2sam", "clip2sam with an MLP"])
def test_a_new_clip2sam_adapter_returns_the_embedding_of_clip(kind):
    torch.manual_seed(0)
    model = Clip2SamAdapter(ADAPTERS[kind][1])
    inputs = inputs_for(kind)
    stride16, stride32 = inputs["maps"][2:]
    region = model.region.detail(stride16) + interpolate(model.region.context(stride32), scale_factor=2)
    weight = avg_pool2d(inputs["masks"], 4)  # 32 x 32 -> 8 x 8
    weight = weight / weight.sum((-1, -2), keepdim=True)
    mean = torch.einsum("bphw,bdhw->bpd", weight, region)
    assert_close(model(**inputs), normalize(mean, dim=-1), rtol=0, atol=1e-5)
    words = normalize(torch.randn(3, D), dim=-1)
    logits = model.logits(words[None], words)[0].diagonal()  # of a perfect match
    assert_close(logits, torch.full((3,), (1 - 0.7) * 2.718281828**2.7))


def test_boxes_are_read_at_a_stride_that_suits_them():
    """About seven cells across: 56 px at stride 8, 112 at 16, more at 32; never finer or coarser than there is."""
    levels = [torch.randn(2, 16, 16 >> i, 16 >> i) for i in range(3)]
    sizes = {20: 0, 56: 0, 100: 0, 120: 1, 200: 1, 230: 2, 900: 2}
    boxes = torch.tensor([[5.0, 9.0, 5.0 + size, 9.0 + size] for size in sizes]).expand(2, -1, -1)
    found = pool_from_pyramid(levels, 8, boxes, 7, 56, sampling_ratio=2)
    for roi, features, level in zip(box_rois(boxes), found, [*sizes.values()] * 2, strict=True):
        expected = roi_align(levels[level], roi[None], 7, 1 / (8 * 2**level), 2, True)[0]
        assert_close(features, expected)


def test_no_prompt_and_an_empty_mask():
    model, inputs = build("clip2sam"), inputs_for("clip2sam")
    inputs["masks"] = torch.zeros_like(inputs["masks"])
    inputs["boxes"] = torch.zeros_like(inputs["boxes"])
    assert_close(model(**inputs).norm(dim=-1), torch.ones(2, 3))
    none = {name: inputs[name][:, :0] for name in ("boxes", "masks", "tokens")}
    assert model(maps(), **none).shape == (2, 0, D)


# ------------------------------------------------------------------------------------------------ ConceptHead


def test_outputs_of_a_new_concept_head():
    torch.manual_seed(0)
    head = ConceptHead(ADAPTERS["concepts"][1])
    out = head(maps())
    assert_close(out.objectness.sigmoid().mean(), torch.tensor(0.047), rtol=0, atol=0.03)  # rare at first
    assert_close(out.logit_scale, torch.full_like(out.logit_scale, 16.0))
    assert_close(out.logit_shift, torch.full_like(out.logit_shift, -0.7))
    stride16, stride32 = maps()[2:]
    region = head.region.detail(stride16) + interpolate(head.region.context(stride32), scale_factor=2)
    rows = [level.flatten(2).mT for level in (region, avg_pool2d(region, 2))]
    assert_close(out.embeds, normalize(torch.cat(rows, 1), dim=-1))  # the tower's own embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_locations_are_row_by_row_stride_16_first(dtype):
    head = build("concepts").to(dtype)
    head.sides.weight.data.zero_()
    head.sides.bias.data.copy_(torch.tensor([-0.5, 0.0, 0.75, 1.25]))  # exact in bfloat16 too
    boxes = head(tuple(level.to(dtype) for level in maps())).boxes[0]
    assert boxes.shape == (8 * 8 + 4 * 4, 4)
    left, top, right, bottom = (2 * torch.tensor([-0.5, 0.0, 0.75, 1.25]).exp()).tolist()  # in strides
    for location, (stride, row, column) in {0: (16, 0, 0), 1: (16, 0, 1), 8: (16, 1, 0), 70: (32, 1, 2)}.items():
        x, y = (column + 0.5) * stride, (row + 0.5) * stride
        expected = [x - left * stride, y - top * stride, x + right * stride, y + bottom * stride]
        assert_close(boxes[location], torch.tensor(expected), rtol=1e-5, atol=1e-4)


# ------------------------------------------------------------------------------------------------ Sam2ClipAdapter


def test_sam2clip_gives_the_maps_of_a_mask_decoder():
    model = build("sam2clip")
    out = model(maps())
    assert [tuple(level.shape[1:]) for level in (*out.high_res, out.embedding)] == [(4, 32, 32), (8, 16, 16), (C, 8, 8)]
    assert [tuple(level.shape[1:]) for level in out.pyramid] == [(C, 32, 32), (C, 16, 16), (C, 8, 8)]
    # Each location of the embedding depends on the whole image; the finer maps depend on their surroundings only.
    changed = [level.clone() for level in maps()]
    changed[2][:, :, 0, 0] += 1
    other = model(tuple(changed))
    moved = (other.embedding - out.embedding).abs().amax(1)
    assert (moved > 1e-5).all()
    moved = (other.high_res[1] - out.high_res[1]).abs().amax(1)
    assert (moved[:, :2, :2] > 1e-5).all() and moved[:, 2:, 2:].max() == 0


@torch.no_grad()
def test_masks_of_many_regions_equal_those_of_one_at_a_time():
    head = build("concepts").mask_head
    features, generator = head.features(maps()), torch.Generator().manual_seed(3)
    corners = torch.rand(2, 21, 2, generator=generator) * 90
    regions = torch.cat([corners, corners + 30], -1)
    together = head(features, regions)
    one_by_one = [head(features, region) for region in regions.split(1, 1)]
    for masks, each in zip(together, zip(*one_by_one, strict=True), strict=True):
        assert masks.shape[:2] == (2, 21)
        assert_close(masks, torch.cat(each, 1), rtol=1e-4, atol=1e-5)
    assert [list(masks.shape) for masks in head(features, regions[:, :0])] == [[2, 0, 28, 28], [2, 0, 56, 56]]
