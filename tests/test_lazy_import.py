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
