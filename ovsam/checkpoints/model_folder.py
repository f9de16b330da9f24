"""Loading a folder that holds a whole model. Nothing in it is trusted: its code never runs, and its configuration and
weights are checked before memory is allocated for them."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from ovsam.checkpoints.weight_files import check_weights, shards_of
from ovsam.errors import InputError
from ovsam.modeling.configuration_ovsam import OVSamConfig
from ovsam.modeling.modeling_ovsam import OVSamModel
from ovsam.modeling.remote_code import SHIM
from ovsam.processing.processing_ovsam import OVSamProcessor
from ovsam.processing.vocabulary import BUILT_IN, Vocabulary

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
SHOWN = 3  # problems that a message names


def load_folder(folder: Path, name: str) -> tuple[OVSamModel, OVSamProcessor]:
    """The model, in evaluation mode on the CPU, and its processor.

    Raises:
        InputError: a file is missing or damaged, the folder is not of a whole OVSam model, it asks for code of its own,
            a setting is out of any sane range, or the weights do not cover the model, have other shapes, or hold NaN or
            infinite values; the message names the first three problems.
    """
    for file in CONFIGS:
        _check_config(folder / file, name)
    check_weights(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a configuration class may raise anything over values it does not expect
        raise InputError(f"{name!r} has a {CONFIG} that cannot be used: {_reason(error)}") from error
    if not isinstance(config, OVSamConfig):
        raise InputError(
            f"{name!r} holds a model of type {config.model_type!r}, not a whole OVSam model: `ovsam compose` makes "
            "one of a SAM and a CLIP, and ovsam-tiny is one."
        )
    _check_words(config, name)
    _check_cover(folder, config, name)
    try:
        model, found = OVSamModel.from_pretrained(
            folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True
        )
    except Exception as error:  # likewise
        raise InputError(f"{name!r} cannot be loaded: {_reason(error)}") from error
    problems = [f"{key} is missing" for key in sorted(found["missing_keys"])]
    problems += [f"{key} has another shape" for key, *_ in sorted(found["mismatched_keys"])]
    problems += [f"{key} holds NaN or infinite values" for key, value in _floats(model) if not value.isfinite().all()]
    if problems:
        raise _refused(name, problems)
    try:
        processor = OVSamProcessor.from_pretrained(folder, trust_remote_code=False)
        tried = processor(images=Image.new("RGB", (32, 32)), text=["a word"])  # most wrong values fail in use only
        with torch.no_grad():  # a tokenizer may have more tokens than the text tower
            model.get_text_features(tried["input_ids"], tried["attention_mask"])
    except Exception as error:  # likewise
        raise InputError(f"{name!r} has a processor or tokenizer that cannot be used: {_reason(error)}") from error
    return model.eval(), processor


def _check_config(path: Path, name: str) -> None:
    if not path.is_file():
        if path.name == CONFIG:
            raise InputError(f"{name!r} lacks {CONFIG}; a model folder is what `save_pretrained` writes.")
        return
    if path.stat().st_size > MAX_CONFIG:
        raise InputError(f"{path.name} of {name!r} has more than {MAX_CONFIG // 2**20} MB; it is no configuration.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no settings, `{...}`")
        for key, value in _settings(content):
            _check_setting(key, value)
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


def _check_setting(key: str, value: Any) -> None:
    if key == "auto_map":
        ours = SHIM.removesuffix(".py") + "."
        named = value.values() if isinstance(value, dict) else [value]
        if not all(isinstance(one, str) and one.startswith(ours) for one in named):
            raise ValueError(f"it asks for Python code of its own (auto_map {value}), which ovsam does not run")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} is {value}; it must be a finite number")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        limit = MAX_LAYERS if LAYERS.search(key) else MAX_SIDE if key in SIDES else MAX_NUMBER
        if abs(value) > limit and key not in ("model_max_length", "max_length"):  # tokenizers write 1e30 for none
            raise ValueError(f"{key} is {value:g}; at most {limit:,} is possible")
        if key == "image_std" and value <= 0:
            raise ValueError(f"image_std holds {value:g}; it must be positive")


def _check_words(config: OVSamConfig, name: str) -> None:
    """The class names are a list or a built-in vocabulary, never a file that a folder chooses; templates fit."""
    words = config.vocabulary
    if isinstance(words, str) and words not in BUILT_IN:
        raise InputError(
            f"{CONFIG} of {name!r} names the vocabulary {words!r}; it must be one of {', '.join(BUILT_IN)}."
        )
    try:
        Vocabulary(["a word"] if words is None else words, config.templates)
    except InputError as error:
        raise InputError(f"{CONFIG} of {name!r} cannot be used: {error}") from error


def _check_cover(folder: Path, config: OVSamConfig, name: str) -> None:
    """Compare the headers of the weights with the model, built without memory, before any is allocated for it."""
    try:
        with torch.device("meta"):
            expected = {key: tuple(value.shape) for key, value in OVSamModel(config).state_dict().items()}
    except Exception as error:  # a module may raise anything over sizes that do not fit each other
        raise InputError(f"{name!r} has a {CONFIG} of which no model can be built: {_reason(error)}") from error
    found: dict[str, tuple[int, ...]] = {}
    for shard in shards_of(folder):
        with safe_open(folder / shard, framework="pt") as file:
            found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    wanted, there = sum(map(math.prod, expected.values())), sum(map(math.prod, found.values()))
    if wanted > 1.1 * there:  # transformers may rename tensors while it loads, so names alone do not tell
        problems = [f"{key} is missing" for key in expected if key not in found]
        problems += [f"{key} has another shape" for key in expected if key in found and found[key] != expected[key]]
        raise _refused(name, problems)


def _floats(model: OVSamModel) -> Iterator[tuple[str, Tensor]]:
    return ((key, value) for key, value in model.state_dict().items() if value.is_floating_point())


def _refused(name: str, problems: list[str]) -> InputError:
    more = f" and {len(problems) - SHOWN:,} more problems" if len(problems) > SHOWN else ""
    return InputError(f"The weights of {name!r} do not fit its {CONFIG}: {', '.join(problems[:SHOWN])}{more}.")


def _reason(error: Exception) -> str:
    """The first sentence of another library's error."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, KeyError):  # its text is the key alone
        text = f"{type(error).__name__} {text}".strip()
    return (text if len(text) <= 200 else f"{text[:197]}...").rstrip(".") + "."
