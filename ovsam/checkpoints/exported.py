"""The settings of an exported model, in the file by which its folder is known.

`onnx_export` writes them and `inference.onnx` reads them.
"""

import json
import os
from pathlib import Path
from typing import Any

from ovsam.errors import InputError

SETTINGS = "ovsam_onnx.json"
FORMAT = 1  # of the settings and the graphs


def is_exported(folder: Any) -> bool:
    """Whether a folder holds an exported model."""
    return isinstance(folder, str | os.PathLike) and os.path.isfile(os.path.join(folder, SETTINGS))


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    text = json.dumps({"format": FORMAT} | settings, indent=2, ensure_ascii=False)
    (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")


def read_settings(folder: Path) -> dict[str, Any]:
    """Raises InputError if they cannot be read, or are of another format."""
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / SETTINGS} cannot be read: {error}") from error
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise InputError(
            f"{folder / SETTINGS} is not of format {FORMAT}; export the model again with this version of ovsam."
        )
    return settings
