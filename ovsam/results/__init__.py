"""The instances found in images: `results.Results`, `instance.Instance`, `tracks`, and label files in `formats`."""

import importlib
import warnings
from typing import Any

_MOVED = {"Results": "results", "Instance": "instance", "write_coco": "formats"}  # names of the first layout


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = f"{__name__}.{_MOVED[name]}"
    warnings.warn(f"{__name__}.{name} is now {new}.{name}.", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(new), name)
