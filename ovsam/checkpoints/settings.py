"""The settings of model folders, of whole models and of parts: JSON files in which any value may be wrong."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ovsam.errors import InputError
from ovsam.modeling.remote_code import SHIM

CONFIG = "config.json"
CONFIGS = (
    CONFIG,
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "generation_config.json",
)
MAX_CONFIG = 10 * 2**20  # bytes
MAX_NUMBER = 10**6  # of any setting; the largest are sizes of token vocabularies
MAX_LAYERS = 1_000
MAX_SIDE = 4_096  # pixels of a model's input
LAYERS = re.compile(r"layers?$|depths?$|blocks?_per_stage$|num_stages$")
SIDES = ("height", "width", "shortest_edge", "longest_edge", "image_size", "target_size", "size", "crop_size")


def check_configs(folder: Path, name: str, part: bool = False) -> None:
    """Check the settings of a folder, before memory is allocated for a model of them.

    Args:
        name: name of the folder, for messages.
        part: whether it is a part of others, which may have Python code (it is not run) and settings of any size but
            numbers of layers and pixels.

    Raises:
        InputError: there is no config.json, a file is damaged, or a setting is out of any sane range.
    """
    if not (folder / CONFIG).is_file():
        raise InputError(f"{name!r} lacks {CONFIG}; a model folder is what `save_pretrained` writes.")
    for file in CONFIGS:
        if (folder / file).is_file():
            _check_config(folder / file, name, part)


def _check_config(path: Path, name: str, part: bool) -> None:
    if path.stat().st_size > MAX_CONFIG:
        raise InputError(f"{path.name} of {name!r} has more than {MAX_CONFIG // 2**20} MB; it is no configuration.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no settings, `{...}`")
        for key, value in _settings(content):
            _check_setting(key, value, part)
    except RecursionError as error:
        raise InputError(f"{path.name} of {name!r} is nested too deeply.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path.name} of {name!r} cannot be used: {str(error).rstrip('.')}.") from error


def _settings(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a configuration with the key that it, or the list around it, stands under."""
    if isinstance(content, dict):
        if "auto_map" in content:
            yield "auto_map", content["auto_map"]
        for name, value in content.items():
            if name != "auto_map":
                yield from _settings(value, str(name))
    elif isinstance(content, list):
        for value in content:
            yield from _settings(value, key)
    else:
        yield key, content


def _check_setting(key: str, value: Any, part: bool) -> None:
    if key == "auto_map":
        if part:
            return
        ours = SHIM.removesuffix(".py") + "."
        named = value.values() if isinstance(value, dict) else [value]
        if not all(isinstance(one, str) and one.startswith(ours) for one in named):
            raise ValueError(f"it asks for Python code of its own (auto_map {value}), which ovsam does not run")
    elif isinstance(value, float) and not math.isfinite(value) and not part:
        raise ValueError(f"{key} is {value}; it must be a finite number")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        limit = MAX_LAYERS if LAYERS.search(key) else MAX_SIDE if key in SIDES else math.inf if part else MAX_NUMBER
        if abs(value) > limit and key not in ("model_max_length", "max_length"):  # tokenizers write 1e30 for none
            raise ValueError(f"{key} is {value:g}; at most {limit:,} is possible")
        if key == "image_std" and value <= 0:
            raise ValueError(f"image_std holds {value:g}; it must be positive")


def reason_of(error: BaseException) -> str:
    """The first sentence of another library's error."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, KeyError):  # its text is the key alone
        text = f"{type(error).__name__} {text}".strip()
    return (text if len(text) <= 200 else f"{text[:197]}...").rstrip(".") + "."
