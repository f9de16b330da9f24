"""Loading a folder that holds a whole model. Nothing in it is trusted: its code never runs, and its configuration and
weights are checked before memory is allocated for them."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from ovsam.checkpoints.settings import CONFIG, check_configs, reason_of
from ovsam.checkpoints.weight_files import check_weights, shards_of
from ovsam.errors import InputError
from ovsam.modeling.configuration_ovsam import OVSamConfig
from ovsam.modeling.modeling_ovsam import OVSamModel
from ovsam.processing.processing_ovsam import OVSamProcessor
from ovsam.processing.vocabulary import BUILT_IN, Vocabulary

SHOWN = 3  # problems that a message names


def load_folder(folder: Path, name: str) -> tuple[OVSamModel, OVSamProcessor]:
    """The model, in evaluation mode on the CPU, and its processor.

    Raises:
        InputError: a file is missing or damaged, the folder is not of a whole OVSam model, it asks for code of its own,
            a setting is out of any sane range, or the weights do not cover the model, have other shapes, or hold NaN or
            infinite values; the message names the first three problems.
    """
    check_configs(folder, name)
    check_weights(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a configuration class may raise anything over values it does not expect
        raise InputError(f"{name!r} has a {CONFIG} that cannot be used: {reason_of(error)}") from error
    if not isinstance(config, OVSamConfig):
        raise InputError(
            f"{name!r} holds a model of type {config.model_type!r}, not a whole OVSam model: `ovsam compose` makes "
            "one of a SAM and a CLIP, and ovsam-tiny is one."
        )
    _check_words(config, name)
    blank = _without_memory(config, name)
    _check_cover(folder, blank, name)
    try:
        model, found = OVSamModel.from_pretrained(
            folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True
        )
    except Exception as error:  # likewise
        raise InputError(f"{name!r} cannot be loaded: {reason_of(error)}") from error
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
    except BaseException as error:  # likewise; a panic of the tokenizers library is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{name!r} has a processor or tokenizer that cannot be used: {reason_of(error)}") from error
    _check_runs(blank, model.eval(), tried, name)
    return model, processor


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


def _without_memory(config: OVSamConfig, name: str) -> OVSamModel:
    """A model that has shapes and no values."""
    try:
        with torch.device("meta"):
            return OVSamModel(config).eval()
    except Exception as error:  # a module may raise anything over sizes that do not fit each other
        raise InputError(f"{name!r} has a {CONFIG} of which no model can be built: {reason_of(error)}") from error


def _check_runs(blank: OVSamModel, model: OVSamModel, inputs: Mapping[str, Any], name: str) -> None:
    """Encode an image: without values, in no time; with values if that fails, as parts of others may not support it."""
    pixels = [inputs.get(key) for key in ("pixel_values", "clip_pixel_values", "clip_window")]
    try:
        _encode(blank, [value if value is None else value.to("meta") for value in pixels])
    except Exception:
        try:
            _encode(model, pixels)
        except Exception as error:  # likewise
            raise InputError(f"{name!r} has a {CONFIG} of which no model can run: {reason_of(error)}") from error


@torch.inference_mode()
def _encode(model: OVSamModel, pixels: list[Tensor | None]) -> None:
    features = model.encode(*pixels)
    if features.concepts is not None:
        model._box_masks(features, features.concepts.boxes[:, :1])


def _check_cover(folder: Path, blank: OVSamModel, name: str) -> None:
    """Compare the headers of the weights with the model, before memory is allocated for it."""
    expected = {key: tuple(value.shape) for key, value in blank.state_dict().items()}
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
