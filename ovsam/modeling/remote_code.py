"""Support for loading a folder with `trust_remote_code=True` in a process that has not imported ovsam.

The folder holds one file of one line that imports this package. If the package is missing, transformers reads that line
and asks for `pip install ovsam`. (Copying sources into the folder, as transformers does, works for flat packages only.)
"""

import os
from pathlib import Path

from transformers import PreTrainedConfig

SHIM = "modeling_ovsam.py"


def write_shim(folder: str | os.PathLike) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / SHIM).write_text("from ovsam import *  # noqa: F403\n")


def auto_map(**classes: str) -> dict[str, str]:
    """Return the `auto_map` of a configuration: Auto class -> class of this package, loaded through the shim."""
    return {auto_class: f"{SHIM.removesuffix('.py')}.{name}" for auto_class, name in classes.items()}


class RemoteCodeConfig(PreTrainedConfig):
    """A configuration whose folder holds the shim. `auto_classes` maps Auto classes to names of this package."""

    auto_classes = {}

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        write_shim(save_directory)
        self.auto_map = auto_map(AutoConfig=type(self).__name__, **self.auto_classes)
        super().save_pretrained(save_directory, *args, **kwargs)
        del self.auto_map  # it belongs to the folder, not to this configuration inside another one

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Does nothing: the shim replaces the sources that transformers would copy into the folder."""
