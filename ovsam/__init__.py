"""Open-vocabulary segmentation for transformers.

Importing it is quick: torch and transformers are imported with the first name that needs them. Its classes are
registered with transformers' Auto classes as soon as these are imported too, before or after it.
"""

import importlib
import importlib.util
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

# These need no torch.
from ovsam.checkpoints.embedded import path as path
from ovsam.errors import InputError as InputError
from ovsam.inference.loading import load as load
from ovsam.processing.vocabulary import Vocabulary as Vocabulary
from ovsam.results.instance import Instance as Instance
from ovsam.results.results import Results as Results

if TYPE_CHECKING:
    from ovsam.inference.public import *  # noqa: F403

__version__ = "0.1.0"
_PUBLIC = "ovsam.inference.public"  # all other names, which need torch
_AUTO = "transformers.models.auto.configuration_auto"  # the module that all Auto classes and pipelines import

_MOVED = {  # documented modules of the first layout -> where they are now; their submodules moved with them
    "ovsam.adapters": "ovsam.modeling.adapters",
    "ovsam.clip": "ovsam.modeling.clip",
    "ovsam.compose": "ovsam.checkpoints.compose",
    "ovsam.configuration_ovsam": "ovsam.modeling.configuration_ovsam",
    "ovsam.convert": "ovsam.checkpoints.convert",
    "ovsam.exports": "ovsam.results.formats",
    "ovsam.images": "ovsam.processing.images",
    "ovsam.modeling_ovsam": "ovsam.modeling.modeling_ovsam",
    "ovsam.pipeline": "ovsam.inference.pipeline",
    "ovsam.postprocessing": "ovsam.processing.postprocessing",
    "ovsam.presets": "ovsam.checkpoints.presets",
    "ovsam.processing_ovsam": "ovsam.processing.processing_ovsam",
    "ovsam.proposers": "ovsam.inference.proposers",
    "ovsam.push": "ovsam.checkpoints.push",
    "ovsam.sam": "ovsam.modeling.sam",
    "ovsam.sam.encoders": "ovsam.modeling.sam.backbone",
    "ovsam.segmenter": "ovsam.inference.segmenter",
    "ovsam.tiling": "ovsam.inference.tiling",
    "ovsam.vocabulary": "ovsam.processing.vocabulary",
}


class _Moved(MetaPathFinder):
    """Imports a module of `_MOVED`, or a submodule of one, under its earlier name."""

    def find_spec(self, name: str, where: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith("ovsam."):
            return None
        parent, _, module = name.rpartition(".")
        new = _MOVED.get(name) or f"{sys.modules[parent].__name__}.{module}"
        return ModuleSpec(name, _MovedLoader(new)) if new != name else None


class _MovedLoader(Loader):
    def __init__(self, new: str) -> None:
        self.new = new

    def exec_module(self, module: ModuleType) -> None:
        warnings.warn(f"{module.__name__} is now {self.new}.", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(self.new)  # an import returns what is there


class _Registration(MetaPathFinder):
    """Imports `_PUBLIC`, which registers the classes, once the Auto classes of transformers are imported.

    It waits for the end of the outermost import of transformers or of a module of ovsam: before that, modules may be
    half executed.
    """

    def __init__(self) -> None:
        self.depth = 0

    def find_spec(self, name: str, where: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(("transformers.", "ovsam.")):
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, where, target) for finder in others)
        spec = next((one for one in found if one is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                self.depth += 1
                try:
                    run(module)
                finally:
                    self.depth -= 1
                if not self.depth and _AUTO in sys.modules and self in sys.meta_path:
                    self.register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def register(self) -> None:
        sys.meta_path.remove(self)
        importlib.import_module(_PUBLIC)


def __getattr__(name: str) -> Any:
    if f"ovsam.{name}" in _MOVED:
        return importlib.import_module(f"ovsam.{name}")
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC), name)


def __dir__() -> list[str]:
    """The public names; the modules that they live in are found by their documents."""
    return sorted([*__getattr__("__all__"), "__version__"])


sys.meta_path.insert(0, _Registration())
if _AUTO in sys.modules:
    sys.meta_path[0].register()  # type: ignore[attr-defined]
sys.meta_path.insert(0, _Moved())
