"""`import ovsam` imports no torch, and its classes are registered with transformers in any order of imports."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # each starts an interpreter

REGISTERED = """
from transformers import AutoConfig, AutoModel
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
config = AutoConfig.for_model("ovsam")
assert type(config).__name__ == "OVSamConfig" and type(config) in PROCESSOR_MAPPING
assert AutoModel._model_mapping[type(config)][0].__name__ == "OVSamModel"
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torch_is_imported_with_the_first_name_that_needs_it():
    run(
        "import sys, ovsam\n"
        "ovsam.Vocabulary(['dog']), ovsam.InputError, ovsam.Results([], (8, 8)), ovsam.load\n"
        "heavy = ('torch', 'transformers', 'timm', 'open_clip')\n"
        "assert not any(name in sys.modules for name in heavy)\n"
        "assert not hasattr(ovsam, '__wrapped__') and 'torch' not in sys.modules\n"
        "from ovsam import *\n"
        "assert Segmenter is ovsam.Segmenter and 'torch' in sys.modules and 'open_clip' not in sys.modules\n"
        "assert {'Segmenter', 'load', '__version__'} <= set(dir(ovsam))\n"
        "try:\n    ovsam.nothing\nexcept AttributeError:\n    pass\nelse:\n    raise SystemExit('no AttributeError')\n"
    )


@pytest.mark.parametrize(
    "first",
    [
        "import ovsam",
        "import transformers\nimport ovsam",
        "from ovsam.modeling.modeling_ovsam import OVSamModel",
        "from transformers import PreTrainedModel\nimport ovsam",
        "import ovsam\nfrom transformers import PreTrainedModel",
        "import ovsam\nfrom transformers import pipeline",
        "from transformers import AutoConfig\nimport ovsam",
    ],
)
def test_classes_are_registered(first):
    run(first + REGISTERED)


def test_transformers_alone_does_not_make_it_slow():
    run(
        "import torch, transformers, ovsam, sys\n"
        "assert 'torchvision' not in sys.modules and 'ovsam.modeling' not in sys.modules\n"
    )


MOVED = """
import importlib, sys, warnings
import ovsam
import ovsam.results
assert 'torch' not in sys.modules
for old, new in ovsam._MOVED.items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = importlib.import_module(old)
    assert module is importlib.import_module(new) and sys.modules[old].__name__ == new, (old, new)
    assert [str(one.message) for one in caught if one.category is DeprecationWarning] == [f"{old} is now {new}."], old
assert ovsam.images is ovsam.processing.images
from ovsam.sam.decode import prompts_per_chunk  # submodules move with their package, under one identity
from ovsam.modeling.sam import decode
assert decode.prompts_per_chunk is prompts_per_chunk and sys.modules["ovsam.sam.decode"] is decode
for name, new in ovsam.results._MOVED.items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = getattr(ovsam.results, name)
    assert found is getattr(importlib.import_module(f"ovsam.results.{new}"), name)
    assert str(caught[0].message) == f"ovsam.results.{name} is now ovsam.results.{new}.{name}."
for name in ("ovsam.nothing", "ovsam.sam.nothing", "ovsam.nothing.images"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit(name)
"""


def test_modules_are_found_under_their_earlier_names():
    run(MOVED)


def test_the_warning_of_an_earlier_name_is_at_the_import(tmp_path):
    (tmp_path / "user.py").write_text("import ovsam\n\nfrom ovsam.images import open_image\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import user"
    done = subprocess.run(
        [sys.executable, "-W", "always::DeprecationWarning", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0 and "user.py:3: DeprecationWarning: ovsam.images is now" in done.stderr, done.stderr
