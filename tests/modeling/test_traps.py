"""Where transformers, open_clip and timm lose weights without a word: saving, loading, parts, precision, meta."""

import functools
import json

import pytest
import torch
from common import D, picture, tiny_config, tiny_model, tiny_processor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torch.utils import deterministic
from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration

import ovsam
from ovsam import InputError, OVSamConfig, OVSamMaskDecoder, OVSamModel, OVSamVisionModel
from ovsam.modeling.clip import DualEncoderConfig

KINDS = {
    "dual": {},
    "dual, SAM 2 and ConvNeXt": {"sam": "sam2", "clip": "convnext"},
    "dual, CLIP": {"clip": "clip", "adapters": False},
    "dual, SigLIP": {"clip": "siglip", "adapters": False},
    "dual, rotary ViT of timm": {"clip": "eva", "adapters": False},
    "clip": {"composition": "clip"},
    "clip, SAM 2 and ResNet": {"composition": "clip", "sam": "sam2", "clip": "resnet"},
    "sam": {"composition": "sam"},
    "sam, SAM 2 and CLIP": {"composition": "sam", "sam": "sam2", "clip": "clip"},
    "sam and SigLIP": {"composition": "sam", "clip": "siglip"},
    "sam and ConvNeXt": {"composition": "sam", "clip": "convnext"},
}
QUICK = ("dual", "clip, SAM 2 and ResNet", "sam, SAM 2 and CLIP")
kinds = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in KINDS]
)
BOXES = [[[10, 20, 60, 80], [70, 5, 125, 50]]] * 2


@functools.cache
def model_of(kind):
    """One model per kind for all tests, which leave it as it is."""
    return tiny_model(**KINDS[kind])


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    @functools.cache
    def saved(kind):
        folder = tmp_path_factory.mktemp("model")
        model_of(kind).save_pretrained(folder)
        return folder

    return saved


@functools.cache
def inputs():
    asked = {"text": ["cat", "red ball"], "negative_text": ["moon"]}
    inputs = tiny_processor(text_padding="max_length")(images=[picture(0), picture(1)], input_boxes=BOXES, **asked)
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}


@torch.no_grad()
def outputs_of(model, **more):
    asked = inputs() | more
    if model.clip.image_size != 128:  # the rotary tower, which has a size of its own
        pixels = torch.nn.functional.interpolate(asked["pixel_values"], [model.clip.image_size] * 2)
        asked["clip_pixel_values"] = pixels
    found = dict(model(**asked))
    if model.concepts is not None:
        del asked["input_boxes"]
        found |= {f"words.{name}": value for name, value in model(proposal_threshold=0.6, **asked).items()}
        assert len(found["words.valid"][0]) > 1
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def assert_equal_outputs(loaded, model, atol=0.0):
    loaded._apply(torch.clone)  # out of the mapped file: tensors lie unaligned there, which can change a last bit
    found, expected = outputs_of(loaded), outputs_of(model)
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], rtol=0, atol=atol, msg=lambda said, name=name: f"{name}: {said}")


def assert_sound(info):
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info


# ------------------------------------------------------------------------------------------------ save and load


@kinds
def test_save_and_load_change_no_bit(kind, folder_of):
    model, folder = model_of(kind), folder_of(kind)
    weights = model.state_dict()
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(weights)  # under the very names: nothing is renamed
    loaded, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(loaded) is OVSamModel and not loaded.training
    assert_sound(info)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, weights[name]) and value.dtype == weights[name].dtype, name
    assert_equal_outputs(loaded, model)


@pytest.mark.parametrize("loader", [OVSamModel, AutoModelForMaskGeneration])
def test_other_loaders_give_the_same(loader, folder_of):
    loaded, info = loader.from_pretrained(folder_of("dual"), output_loading_info=True)
    assert type(loaded) is OVSamModel
    assert_sound(info)
    assert_equal_outputs(loaded, model_of("dual"))


def test_twice_saved_is_the_same_file(folder_of, tmp_path):
    folders = [folder_of("dual"), tmp_path / "once", tmp_path / "twice"]
    for before, after in zip(folders, folders[1:], strict=False):
        OVSamModel.from_pretrained(before).save_pretrained(after)
    assert (folders[1] / "config.json").read_text() == (folders[2] / "config.json").read_text()
    first, second = (load_file(folder / "model.safetensors") for folder in folders[::2])
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_shards_of_any_name_as_in_hub(folder_of, tmp_path):
    """hub/ovsam-tiny has its text tower in a shard of its own, in half precision; config.json gives its dtype:
    a half-precision folder would otherwise open in half precision, which is slow on a CPU."""
    folder = folder_of("dual")
    weights = load_file(folder / "model.safetensors")
    shards = {
        "text_model.safetensors": {n: t.half() for n, t in weights.items() if ".text_model." in n},
        "vision_model.safetensors": {n: t.half() for n, t in weights.items() if ".text_model." not in n},
    }
    for name, shard in shards.items():
        save_file(shard, tmp_path / name, metadata={"format": "pt"})
    where = {tensor: name for name, shard in shards.items() for tensor in shard}
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert_sound(info)
    assert {tensor.dtype for tensor in loaded.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    for name, tensor in loaded.state_dict().items():
        assert_close(tensor, weights[name], rtol=1e-3, atol=1e-6)
    rounded = {name: t.half().to(t.dtype) if t.is_floating_point() else t for name, t in weights.items()}
    assert_equal_outputs(loaded, OVSamModel.from_pretrained(None, config=loaded.config, state_dict=rounded), atol=1e-5)


@kinds
def test_parts_load_from_the_wholes_folder(kind, folder_of):
    model = model_of(kind)
    vision, info = OVSamVisionModel.from_pretrained(folder_of(kind), output_loading_info=True)
    assert_sound(info)
    decoder, info = OVSamMaskDecoder.from_pretrained(folder_of(kind), output_loading_info=True)
    assert_sound(info)
    whole = model.state_dict()
    for part in (vision, decoder):
        part._apply(torch.clone)
        assert 0 < sum(p.numel() for p in part.parameters()) < sum(p.numel() for p in model.parameters())
        assert all(torch.equal(tensor, whole[name]) for name, tensor in part.state_dict().items())
    if model.clip.image_size == 128:
        with torch.no_grad():
            features = vision(inputs()["pixel_values"])
            expected = model.encode(inputs()["pixel_values"])
            decoded = decoder(features.sam, input_boxes=inputs()["input_boxes"])
            out = model(features=expected, input_boxes=inputs()["input_boxes"])
        for one, other in zip(features.maps, expected.maps, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(features.sam.embedding, expected.sam.embedding)
        if model.config.composition != "sam":
            assert torch.equal(features.clip.pool_map, expected.clip.pool_map)
        assert torch.equal(decoded.masks, out.pred_masks) and torch.equal(decoded.iou, out.iou_scores)
        three = decoder(features.sam, multimask_output=True, input_boxes=inputs()["input_boxes"])
        assert three.masks.shape[2] == 3


def test_an_adapter_can_be_swapped(folder_of, tmp_path):
    other = tiny_model().concepts
    other.embedding[-1].weight.data.mul_(-1)
    other.save_pretrained(tmp_path)
    model = OVSamModel.from_pretrained(folder_of("dual"))
    model.concepts = ovsam.ConceptHead.from_pretrained(tmp_path)
    model._apply(torch.clone)
    with torch.no_grad():
        features = model.encode(inputs()["pixel_values"])
        assert_close(features.concepts.embeds, other(features.maps).embeds, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "swapped")
    assert_equal_outputs(OVSamModel.from_pretrained(tmp_path / "swapped"), model)


# ---- weights that are not in a file


@pytest.fixture
def poisoned_memory():
    """torch fills uninitialised memory with NaN."""
    torch.use_deterministic_algorithms(True)
    assert deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@kinds
def test_all_weights_are_initialised(kind, poisoned_memory):
    """Neither parameters that the file lacks nor buffers that no file holds."""
    model, info = OVSamModel.from_pretrained(
        None, config=tiny_config(**KINDS[kind]), state_dict={}, output_loading_info=True
    )
    assert len(info["missing_keys"]) >= len(list(model.parameters()))
    fresh = OVSamModel(tiny_config(**KINDS[kind]))
    expected = dict(fresh.named_parameters()) | dict(fresh.named_buffers())
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        tensor, like = tensor.float(), expected[name].float()
        assert not tensor.isnan().any(), name
        tensor, like = tensor[tensor.isfinite()], like[like.isfinite()]  # a causal mask is -inf in part
        assert tensor.abs().max() < 10 * like.abs().max().clamp(min=1), name
        if found[name].ndim > 1 and like.std() > 0:  # drawn from much the same distribution, not left at one value
            assert 0.05 < tensor.std() / like.std() < 20, name
    torch.use_deterministic_algorithms(False)
    model.eval()
    asked = {name: inputs()[name] for name in ("input_ids", "attention_mask", "input_boxes")}
    with torch.no_grad():
        pixels = inputs()["pixel_values"]
        own = torch.nn.functional.interpolate(pixels, [model.clip.image_size] * 2)
        out = model(pixel_values=pixels, clip_pixel_values=own, **asked)
    assert out.pred_masks.isfinite().all() and out.logits.isfinite().all()


@kinds
def test_half_a_checkpoint_leaves_the_other_half_sound(kind, poisoned_memory):
    model = model_of(kind)
    kept = {name: tensor for index, (name, tensor) in enumerate(model.state_dict().items()) if index % 2}
    loaded = OVSamModel.from_pretrained(None, config=tiny_config(**KINDS[kind]), state_dict=dict(kept))
    for name, tensor in loaded.state_dict().items():
        assert tensor.isfinite().all(), name
        if name in kept and "position" not in name:  # a code that the file holds once is tied to the one it holds
            assert torch.equal(tensor, kept[name]), name


@kinds
def test_a_model_on_meta_has_meta_tensors_only(kind):
    with torch.device("meta"):
        model = OVSamModel(tiny_config(**KINDS[kind]))
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert set(model.state_dict()) == set(model_of(kind).state_dict())


def test_buffers_and_parameters_that_only_timm_initialises(tmp_path, poisoned_memory):
    """Buffers that no file holds (tables of a trunk's attention) and parameters of timm's own layers: our dual encoder
    is no PreTrainedModel that could take care of them."""
    text = {"hidden_size": D, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = DualEncoderConfig(architecture="test_coatnet", text_config=text, embed_dim=D, image_size=160)
    config = tiny_config(adapters=False)
    config.clip_config = clip
    torch.manual_seed(0)
    model = OVSamModel(config).eval()
    assert [name for name, _ in model.named_non_persistent_buffers() if name.startswith("clip.vision_model")]
    model.save_pretrained(tmp_path)
    loaded = OVSamModel.from_pretrained(tmp_path)
    empty = OVSamModel.from_pretrained(None, config=config, state_dict={})
    torch.use_deterministic_algorithms(False)
    assert_equal_outputs(loaded, model, atol=1e-5)
    assert all(outputs_of(empty.eval())[name].isfinite().all() for name in ("pred_masks", "logits"))


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("kind", ["dual", "clip, SAM 2 and ResNet", "sam", "dual, CLIP"])
def test_bfloat16_keeps_coordinates_exact(kind, folder_of):
    model = model_of(kind)
    half = AutoModel.from_pretrained(folder_of(kind), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.sam.model.shared_image_embedding.positional_embedding.dtype == torch.float32
    codes = []
    for one in (model, half):
        one.sam.model.prompt_encoder.shared_embedding.register_forward_hook(
            lambda *seen: codes.append(seen[-1].clone())
        )
    small = torch.tensor([[[100.25, 90.5, 104.75, 95.0]]]).expand(2, -1, -1)
    asked = inputs() | {"input_boxes": small}
    with torch.no_grad():
        outs = [one(**asked) for one in (model, half)]
    for one in (model, half):
        one.sam.model.prompt_encoder.shared_embedding._forward_hooks.clear()
    assert len(codes) == 4 and torch.equal(codes[0], codes[2]) and torch.equal(codes[1], codes[3])
    assert outs[1].pred_masks.dtype == torch.bfloat16
    correlation = torch.corrcoef(torch.stack([out.pred_masks.float().flatten() for out in outs]))[0, 1]
    assert correlation > 0.95
    assert (outs[1].class_embeds.float() * outs[0].class_embeds).sum(-1).min() > 0.9
    if half.concepts is not None:
        concepts = outs[1].features.concepts
        assert concepts.boxes.dtype == concepts.logit_scale.dtype == torch.float32
        with torch.no_grad():
            words = half(features=outs[1].features, input_ids=asked["input_ids"], proposal_threshold=0.5)
        place = (words.pred_boxes[0, 0] == concepts.boxes[0]).all(-1)
        assert place.any()  # the very boxes, not rounded ones


def test_the_dtype_is_saved(folder_of, tmp_path):
    OVSamModel.from_pretrained(folder_of("dual"), dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert AutoModel.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert AutoModel.from_pretrained(folder_of("dual")).dtype == torch.float32


# ------------------------------------------------------------------------------------------------ configuration


@kinds
def test_the_config_survives_its_json(kind, tmp_path):
    config = tiny_config(**KINDS[kind], templates=["a photo of a {}"], score_threshold=0.45)
    config.save_pretrained(tmp_path)
    for loaded in (OVSamConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is OVSamConfig
        for part in ("sam_config", "clip_config", "sam2clip_config", "clip2sam_config", "concepts_config"):
            assert type(getattr(loaded, part)) is type(getattr(config, part))
        assert loaded.templates == ["a photo of a {}"] and loaded.score_threshold == 0.45
        again = OVSamConfig.from_dict(loaded.to_dict())
        assert again.to_dict() == loaded.to_dict()
        with torch.device("meta"):
            assert set(OVSamModel(loaded).state_dict()) == set(model_of(kind).state_dict())
    nested = json.loads((tmp_path / "config.json").read_text())
    assert nested["composition"] == config.composition and "auto_map" not in (nested.get("concepts_config") or {})


def test_a_config_of_dictionaries():
    config = tiny_config()
    parts = {name: value.to_dict() for name, value in vars(config).items() if name.endswith("_config") and value}
    same = OVSamConfig(**parts)
    assert {name: type(getattr(same, name)) for name in parts} == {name: type(getattr(config, name)) for name in parts}


def test_invalid_compositions_raise_an_error():
    with pytest.raises(InputError, match="must be one of dual, clip, sam"):
        OVSamConfig(composition="both")
    with pytest.raises(InputError, match="needs sam2clip_config"):
        OVSamConfig(composition="clip")


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("kind", ["dual, SAM 2 and ConvNeXt", "dual", "sam, SAM 2 and CLIP", "clip"])
def test_checkpointed_gradients_are_the_gradients(kind):
    grads = []
    for checkpointed in (False, True):
        model = tiny_model(**KINDS[kind]).train()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()  # or checkpointed layers would count each batch twice
        if checkpointed:
            model.activation_checkpointing_enable()
            assert sum(getattr(module, "gradient_checkpointing", False) for module in model.modules()) >= 2
        out = model(**inputs())
        (out.pred_masks.square().mean() + out.logits.square().mean()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 50
    for name, grad in grads[0].items():
        assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max().clamp(min=1)))


def test_gradients_reach_the_adapters_through_the_whole():
    """Frozen towers, adapters in training: the loss of prompts and of proposals reaches every parameter of both."""
    model = tiny_model().requires_grad_(False)
    adapters = [model.concepts, model.clip2sam]
    for adapter in adapters:
        adapter.requires_grad_(True).train()
    prompts = model(**inputs())
    asked = {name: value for name, value in inputs().items() if name != "input_boxes"}
    words = model(features=prompts.features, proposal_threshold=0.0, refine=False, **asked)
    concepts = prompts.features.concepts
    loss = prompts.logits.square().mean() + words.logits.square().mean() + words.pred_masks.square().mean()
    loss = loss + concepts.boxes.square().mean() * 1e-4 + concepts.objectness.square().mean()
    loss.backward()
    for adapter in adapters:
        for name, parameter in adapter.named_parameters():
            if adapter is model.clip2sam and name.startswith("pyramid.laterals.0."):
                continue  # for small masks, of which a random decoder makes none
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith(("concepts.", "clip2sam.")))
