"""Folders that load with trust_remote_code=True in processes that never imported ovsam."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import picture, tiny_model, tiny_processor
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModel, AutoProcessor

import ovsam

ROOT = Path(__file__).resolve().parents[2]

# First as if ovsam were not installed; then loads model and processor from one folder, answers a question, and saves
# them in another.
SCRIPT = """
import sys
from transformers import AutoConfig, AutoModel, AutoProcessor
source, target, picture, first = sys.argv[1:]
load = {"pretrained_model_name_or_path": source, "trust_remote_code": True}

class Uninstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ovsam":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Uninstalled())
for loader in (AutoConfig, AutoModel, AutoProcessor):
    try:
        loader.from_pretrained(**load)
    except ImportError as error:
        print(error)
sys.meta_path.pop(0)

assert "ovsam" not in sys.modules
loaders = {"model": AutoModel, "processor": AutoProcessor}
loaded = {first: loaders.pop(first).from_pretrained(**load)}  # through trust_remote_code; ovsam is imported afterwards
loaded |= {name: loader.from_pretrained(**load) for name, loader in loaders.items()}
model, processor = loaded["model"], loaded["processor"]
head = AutoModel.from_pretrained(source + "/concepts", trust_remote_code=True)

import torch
from PIL import Image
from safetensors.torch import save_file
import ovsam
assert type(model) is ovsam.OVSamModel and type(processor) is ovsam.OVSamProcessor
assert type(head) is ovsam.ConceptHead
with torch.no_grad():
    out = model(**processor(images=Image.open(picture), text=["cat", "dog"], input_boxes=[[[5, 9, 70, 80]]]))
model.save_pretrained(target)
processor.save_pretrained(target)
head.save_pretrained(target + "/concepts")
save_file({"masks": out.pred_masks, "logits": out.logits}, target + "/answer.safetensors")
"""


def run(*arguments, cache):
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cache)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model()
    model.save_pretrained(folder)
    model.concepts.save_pretrained(folder / "concepts")
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_process_that_never_imported_ovsam(folder, tmp_path):
    """It saves the same kind of folder; without ovsam installed, the error states the remedy."""
    image = picture(3)
    image.save(tmp_path / "picture.png")
    inputs = tiny_processor()(images=image, text=["cat", "dog"], input_boxes=[[[5, 9, 70, 80]]])
    with torch.no_grad():
        out = tiny_model()(**inputs)
    generations = [folder, tmp_path / "second", tmp_path / "third"]
    for source, target, first in zip(generations[:-1], generations[1:], ("model", "processor"), strict=True):
        without_ovsam = run(source, target, tmp_path / "picture.png", first, cache=tmp_path).splitlines()
        assert len(without_ovsam) == 3
        for said in without_ovsam:
            assert "not found in your environment: ovsam." in said and "pip install ovsam" in said
        answer = load_file(target / "answer.safetensors")
        assert_close(answer["masks"], out.pred_masks, rtol=0, atol=1e-5)
        assert_close(answer["logits"], out.logits, rtol=0, atol=1e-5)
        assert (target / "modeling_ovsam.py").read_text() == (folder / "modeling_ovsam.py").read_text()
        assert len(list(target.glob("*.py"))) == 1  # none of our sources was copied
    # trust_remote_code is not needed once ovsam is imported.
    assert type(AutoModel.from_pretrained(generations[-1])) is ovsam.OVSamModel
    assert type(AutoProcessor.from_pretrained(generations[-1])) is ovsam.OVSamProcessor


@pytest.mark.parametrize("where", ["saved", "hub/ovsam-tiny"])
def test_every_name_in_auto_map_is_in_the_shim(where, folder):
    folder = folder if where == "saved" else ROOT / where
    imported = set()
    for statement in ast.parse((folder / "modeling_ovsam.py").read_text()).body:
        assert isinstance(statement, ast.ImportFrom) and statement.module == "ovsam"
        names = [alias.name for alias in statement.names]
        imported |= set(ovsam.__all__ if names == ["*"] else names)
    for name in ("config.json", "processor_config.json"):
        references = json.loads((folder / name).read_text())["auto_map"].values()
        assert references and {reference.split(".")[0] for reference in references} == {"modeling_ovsam"}
        assert {reference.split(".")[1] for reference in references} <= imported


def test_saving_does_not_change_the_model(tmp_path):
    """Of the folder's auto_map: the config may become part of another."""
    model, processor = tiny_model(), tiny_processor()
    model.concepts.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())["concepts_config"]
    assert "auto_map" not in processor.to_dict() and not hasattr(model.config, "auto_map")
