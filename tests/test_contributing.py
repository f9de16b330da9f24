"""The example family of CONTRIBUTING.md: its file, its dictionary line and its test class, as they stand."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from testers.clip_side import ClipSideTester, make_inputs

from ovsam.modeling.clip import CLIP_SIDES

TEXT = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def example(name: str) -> str:
    found = re.search(rf"<!-- example: {name} -->\n```python\n(.*?)```", TEXT, re.S)
    assert found, name
    return found.group(1)


file = types.ModuleType("ovsam.modeling.clip.patch_clip")
sys.modules[file.__name__] = file  # transformers looks up the annotations of a configuration in its module
exec(example("file"), file.__dict__)
own = {"ClipSideTester": ClipSideTester, "make_inputs": make_inputs, "torch": torch, "__name__": __name__}
given = vars(file) | own
exec(example("test"), given)
TestPatchClip = given["TestPatchClip"]


@pytest.fixture(scope="module", autouse=True)
def line():
    """The dictionary line, for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        for family, side in eval("{" + example("line") + "}", vars(file)).items():
            patch.setitem(CLIP_SIDES, family, side)
        yield


def test_the_example_is_short():
    assert len(example("line").splitlines()) == 1
    assert len(example("test").splitlines()) <= 15
