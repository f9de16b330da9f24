"""An invalid folder of a whole model raises an error of one sentence; its code never runs."""

import json
import shutil

import pytest
import torch
from common import tiny_model, tiny_processor
from safetensors.torch import load_file, save_file

import ovsam
from ovsam.errors import InputError
from ovsam.modeling.modeling_ovsam import OVSamModel


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "whole"
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "m")


IMAGES = {"image_processor_type": "Sam2ImageProcessor", "size": {"height": 128, "width": 128}}


def change(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_sound_folder_loads(folder):
    assert ovsam.load(folder, "cpu").where(torch.rand(3, 64, 64), ["cat"], threshold=0.0) is not None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda w: {"x": torch.zeros(1)},
            r"do not fit its config.json: .* is missing, .* more problems",
        ),
        (lambda w: {k: v for k, v in w.items() if not k.startswith("concepts")}, "concepts.* is missing"),
        (lambda w: {k: v * torch.nan if v.is_floating_point() else v for k, v in w.items()}, "NaN or infinite values"),
    ],
)
def test_weights_that_do_not_fit(folder, damage, message):
    weights = damage(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        ovsam.load(folder, "cpu")


@pytest.mark.parametrize(
    "settings",
    [
        {"mask_head_weight": float("nan")},
        {"max_locations": 10**12},
        {"max_locations": None},
        {"proposal_threshold": None},
        {"score_threshold": 1.5},
        {"composition": 3},
        {"score_calibration": [1.0, [1, 2]]},
        {"sam_config": "x"},
        {"concepts_config": [1]},
        {"templates": 5},
        {"templates": ["no place for the word"]},
        {"vocabulary": 5},
        {"vocabulary": "/etc/words.txt"},
    ],
)
def test_a_hostile_configuration(folder, settings):
    change(folder / "config.json", **settings)
    with pytest.raises(InputError, match="config.json"):
        ovsam.load(folder, "cpu")


@pytest.mark.parametrize(("key", "value"), [("strides", "[8]"), ("mask_stride", None)])
def test_a_configuration_whose_model_cannot_run(folder, key, value):
    content = json.loads((folder / "config.json").read_text())
    assert key in content["concepts_config"]
    content["concepts_config"][key] = value
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="config.json"):
        ovsam.load(folder, "cpu")


def test_a_part_without_shapes_alone_is_tried_with_values(folder, monkeypatch):
    encode, kinds = OVSamModel.encode, []

    def only_values(self, pixels, *rest, **options):
        kinds.append(pixels.device.type)
        if kinds[-1] == "meta":
            raise NotImplementedError("no shapes alone")
        return encode(self, pixels, *rest, **options)

    monkeypatch.setattr(OVSamModel, "encode", only_values)
    ovsam.load(folder, "cpu")
    assert kinds == ["meta", "cpu"]


@pytest.mark.parametrize("content", ["", "[]", "null", "[" * 100_000, "{", "\ud800".encode("utf-8", "surrogatepass")])
def test_an_invalid_configuration(folder, content):
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match="config.json of"):
        ovsam.load(folder, "cpu")


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        (
            "processor_config.json",
            {"image_processor": {"image_processor_type": "Sam2ImageProcessor", "resample": 1323}},
        ),
        ("processor_config.json", {"clip_images": ["x"]}),
        ("tokenizer_config.json", {"pad_token": None}),
    ],
)
def test_a_processor_that_fails_in_use(folder, file, settings):
    change(folder / file, **settings)
    with pytest.raises(InputError, match="has a processor or tokenizer that cannot be used"):
        ovsam.load(folder, "cpu")


def test_a_tokenizer_that_panics(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "B", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="has a processor or tokenizer that cannot be used"):
        ovsam.load(folder, "cpu")


def test_a_tokenizer_with_more_tokens_than_the_text_tower(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] = {word: number + 100_000 for word, number in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        token["id"] += 100_000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="has a processor or tokenizer that cannot be used"):
        ovsam.load(folder, "cpu")


def test_a_token_that_the_text_tower_lacks(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["cat"] = 100_000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    segmenter = ovsam.load(folder, "cpu")
    with pytest.raises(InputError, match="has tokens that its text tower lacks"):
        segmenter.where(torch.rand(3, 64, 64), ["cat"])


def test_code_of_a_folder_never_runs(folder, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom ovsam import OVSamProcessor as X\n")
    change(folder / "processor_config.json", auto_map={"AutoProcessor": "evil.X"}, processor_class="X")
    with pytest.raises(InputError, match="asks for Python code of its own"):
        ovsam.load(folder, "cpu")
    assert not (tmp_path / "ran").exists()
