"""hub/ovsam-tiny and the adapters inside it: output of hatch_build.py and hub/build.py, and the check of mirrors."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from common import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import hatch_build
import ovsam
from hatch_build import CHECKPOINT, DECODER_SHARD, ShardError, build_adapters
from ovsam.modeling.adapters import ADAPTERS


def script(path: str):
    """A module that is run and never imported, imported."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


# ---- the build hook, on shards of a few numbers


@pytest.fixture
def tree(tmp_path):
    """The root of a tree with a decoder shard; every adapter has a folder without weights."""
    (tmp_path / CHECKPOINT).mkdir(parents=True)
    tensors = {f"{name}.{key}.weight": torch.rand(2, 3).half() for name in ADAPTERS for key in ("out", "detail")}
    tensors |= {f"{name}.scale": torch.rand(3) for name in ADAPTERS} | {"sam.model.mask_decoder": torch.rand(2)}
    save_file(tensors, tmp_path / CHECKPOINT / DECODER_SHARD)
    for name in ADAPTERS:
        (tmp_path / "adapters" / f"{name}-tiny").mkdir(parents=True)
        (tmp_path / "adapters" / f"{name}-tiny" / "config.json").write_text("{}")
    return tmp_path


def test_each_adapter_gets_its_own_tensors_and_no_others(tree):
    whole = load_file(tree / CHECKPOINT / DECODER_SHARD)
    folders = build_adapters(tree)
    assert folders == [tree / "adapters" / f"{name}-tiny" for name in sorted(ADAPTERS)]
    for name, folder in zip(sorted(ADAPTERS), folders, strict=True):
        own = load_file(folder / "model.safetensors")
        assert own.keys() == {"out.weight", "detail.weight", "scale"}
        for key, tensor in own.items():
            assert torch.equal(tensor, whole[f"{name}.{key}"]) and tensor.dtype == whole[f"{name}.{key}"].dtype


def test_correct_files_are_kept_and_others_replaced(tree):
    first, *others = (folder / "model.safetensors" for folder in build_adapters(tree))
    before = [path.stat().st_mtime_ns for path in (first, *others)]
    build_adapters(tree)
    assert [path.stat().st_mtime_ns for path in (first, *others)] == before
    right = first.read_bytes()
    first.write_bytes(right[:-1])
    build_adapters(tree)
    assert first.read_bytes() == right and [path.stat().st_mtime_ns for path in others] == before[1:]
    assert sorted(path.name for path in first.parent.iterdir()) == ["config.json", first.name]


@pytest.mark.parametrize("broken", ["cut", "page", "gone"])
def test_a_broken_shard_raises_an_error(tree, broken):
    shard = tree / CHECKPOINT / DECODER_SHARD
    damage = {
        "cut": lambda: shard.write_bytes(shard.read_bytes()[:-1]),
        "page": lambda: shard.write_text("<!doctype html><title>version of a large file</title>"),
        "gone": shard.unlink,
    }
    damage[broken]()
    with pytest.raises(ShardError) as error:
        build_adapters(tree)
    assert str(shard) in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("then run `python hatch_build.py`.")
    assert not list(tree.glob("adapters/*/*.safetensors"))


@pytest.mark.parametrize(("version", "built"), [("editable", True), ("standard", False)])
def test_an_editable_install_builds_them(tree, monkeypatch, version, built):
    monkeypatch.setattr(hatch_build, "build_text_shard", lambda folder: folder)
    build_data: dict = {"force_include": {}}
    hatch_build.get_build_hook()(str(tree), {}, None, None, str(tree), "wheel").initialize(version, build_data)
    assert len(list(tree.glob("adapters/*/model.safetensors"))) == (len(ADAPTERS) if built else 0)
    assert not any("adapters" in path for path in build_data["force_include"])


# ---- hub/build.py


def test_parts_that_do_not_make_the_whole_raise_an_error():
    builder = script("hub/build.py")
    config = builder.tiny_config({})
    with torch.device("meta"):
        names = set(ovsam.OVSamModel(config).state_dict())
    builder.check_whole(config, names)
    with pytest.raises(SystemExit, match=r"missing \['concepts.scale_shift.bias'\], not wanted \['other'\]"):
        builder.check_whole(config, names - {"concepts.scale_shift.bias"} | {"other"})


@pytest.mark.weights
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_published_adapter_loads_whole(name):
    folder = ROOT / "adapters" / f"{name}-tiny"
    adapter, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert adapter.config.model_type.startswith(f"ovsam_{name}")
    assert all(tensor.isfinite().all() for tensor in adapter.state_dict().values())


@pytest.mark.weights
def test_mirrors_equal_their_parts():
    """The check of `python hub/build.py --check`."""
    builder = script("hub/build.py")
    assert builder.differences() == []


@pytest.mark.weights
def test_drift_is_found(tmp_path):
    """Each kind by a sentence of its own."""
    builder = script("hub/build.py")
    mirror = copied(ROOT / "hub" / "ovsam-tiny", tmp_path / "mirror")
    adapters = {name: copied(folder, tmp_path / name) for name, folder in builder.ADAPTERS.items()}
    assert builder.differences(mirror, adapters) == []

    (mirror / "README.md").write_text((mirror / "README.md").read_text() + "!")
    (mirror / "failures.jpg").write_bytes(b"another")
    (mirror / "modeling_ovsam.py").write_text("import os")
    for path, old, new in (
        (mirror / "config.json", '"max_locations": 300', '"max_locations": 299'),
        (mirror / "config.json", '"dtype": "float32"', '"dtype": "float16"'),
        (mirror / "config.json", '"modeling_ovsam.OVSamModel"', '"modeling_ovsam.Other"'),
        (mirror / "processor_config.json", '"max_text_length": 64', '"max_text_length": 63'),
        (mirror / "model.safetensors.index.json", '"concepts.sides', '"concepts.lost'),
        (adapters["concepts"] / "config.json", '"width": 128', '"width": 127'),
        (adapters["concepts"] / "README.md", "license: apache-2.0", "license: mit"),
        (adapters["concepts"] / "README.md", "## Limits", "## No limits"),
    ):
        text = path.read_text()
        assert old in text, old
        path.write_text(text.replace(old, new))
    weights = {name: tensor.clone() for name, tensor in load_file(adapters["clip2sam"] / "model.safetensors").items()}
    weights["log_scale"] += 1
    save_file(weights, adapters["clip2sam"] / "model.safetensors")

    found = builder.differences(mirror, adapters)
    for sentence in (
        "README.md is not model_card.md",
        "failures.jpg is not",
        "modeling_ovsam.py is not the shim",
        "config.json has another max_locations",
        'lacks "dtype": "float32"',
        "another auto_map",
        "processor_config.json is not the processor",
        "index.json does not list the tensors",
        "config.json has another width",
        "another license than model_card.md",
        "does not end as model_card.md says",
        "model.safetensors has other weights",
    ):
        assert sum(sentence in each for each in found) == 1, (sentence, found)
