"""Composition of whole models from parts: a SAM, a CLIP and, optionally, adapters."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    Sam2ImageProcessor,
    SamImageProcessor,
)

from ovsam.checkpoints import text_tower
from ovsam.checkpoints.embedded import find_checkpoint
from ovsam.checkpoints.settings import check_configs, reason_of
from ovsam.checkpoints.tokenizer import clip_tokenizer
from ovsam.checkpoints.weight_files import OPEN_CLIP, check_weights, fetch, is_open_clip
from ovsam.errors import InputError
from ovsam.modeling.adapters import ADAPTERS
from ovsam.modeling.clip import CLIP_SIDES, ClipSide, OpenClipConfig
from ovsam.modeling.clip.imagenet import ImageNetSide, pretrained_imagenet
from ovsam.modeling.configuration_ovsam import COMPOSITIONS, OVSamConfig
from ovsam.modeling.modeling_ovsam import OVSamModel
from ovsam.modeling.sam import SAM_SIDES, Sam2Side, Sam2VideoSide
from ovsam.processing.arguments import choice, short
from ovsam.processing.processing_ovsam import OVSamProcessor

IMAGENET = "imagenet:"  # prefix of the name of a classifier of timm
# Video models -> the SAM side for the image model inside each.
TRACKERS = {tracker: kind for kind, side in SAM_SIDES.items() for tracker in vars(side).get("trackers", ())}
CALIBRATED = (
    "objectness_weight",
    "score_calibration",
    "score_threshold",
    "proposal_threshold",
    "objectness_threshold",
)


@dataclass
class Part:
    """A loaded part: `state` holds its weights under the names of its side or adapter; `folder` is the folder of its
    processor, None for a model in memory; `settings` are the fields of OVSamConfig that it sets."""

    name: str
    config: PreTrainedConfig
    state: dict[str, Tensor]
    folder: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def compose(sam: str, clip: str, clip_size: int | None = None, **parts) -> tuple[OVSamModel, OVSamProcessor]:
    """Return a model and its processor from parts.

    Args:
        sam: a SAM-family model of transformers (SAM 1, SAM-HQ, SAM 2, EdgeTAM, ...; of a tracker, the image model is
            taken, or with `memory` all of it).
        clip: a CLIP, SigLIP, SigLIP 2 or OWLv2 of transformers, an open_clip model, or imagenet:NAME for a classifier
            of timm (ConSE). OWLv2 has a ConceptHead of its own.
        clip_size: side in pixels of CLIP's input, if it has an image tower beside SAM's. By default the size of the
            model input for towers with stages, and the size in training for plain transformers.
        parts: the other arguments of `compose_model`.

    Each part is a folder or a Hub id ("ORG/NAME" or "ORG/NAME@REVISION"); the folder of a whole OVSam model can be
    given for any part.

    Raises:
        InputError: a part cannot be found or downloaded, is of another kind, or does not fit the others.
    """
    model, found = compose_model(sam, clip, **parts)
    return model, build_processor(model, found["sam"], found["clip"], clip_size)


def from_parts(sam: str | PreTrainedModel, clip: str | PreTrainedModel, **parts) -> OVSamModel:
    """Return a model from Hub ids, folders, or models in memory; the arguments are those of `compose_model`."""
    return compose_model(sam, clip, **parts)[0]


def compose_model(
    sam: str | PreTrainedModel,
    clip: str | PreTrainedModel,
    clip2sam: str | PreTrainedModel | None = None,
    sam2clip: str | PreTrainedModel | None = None,
    concepts: str | PreTrainedModel | None = None,
    composition: str | None = None,
    memory: bool = False,
    **config,
) -> tuple[OVSamModel, dict[str, Part]]:
    """Return a model from parts, and its parts by name.

    Args:
        sam, clip: as in `compose`, or models in memory, whose weights are copied.
        clip2sam, sam2clip, concepts: adapters that fit these two.
        composition: source of the image features; by default "clip" with a sam2clip, else "dual".
        memory: whether to keep the memory of a tracker, SAM 2's or EdgeTAM's, with which OVSamVideoModel tracks.
        config: further fields of OVSamConfig, such as thresholds.

    Raises:
        InputError: as in `compose`.
    """
    if composition is not None:
        choice("composition", composition, COMPOSITIONS)
    parts = {"sam": load_sam(sam, memory), "clip": load_clip(clip)}
    given = zip(ADAPTERS, (clip2sam, sam2clip, concepts), strict=True)
    parts |= {name: load_adapter(part, name) for name, part in given if part is not None}
    settings = {"vocabulary": "lvis"}
    for name in ("clip", "clip2sam", "concepts"):  # the settings of the ConceptHead take precedence
        settings |= parts[name].settings if name in parts else {}
    whole = OVSamConfig(
        composition=composition or ("clip" if "sam2clip" in parts else "dual"),
        **{f"{name}_config": part.config for name, part in parts.items()},
        **settings | config,
    )
    for part in _with_sub_configs(whole):
        part._name_or_path = ""  # drop source paths from the saved config
    with torch.device("meta"):
        wanted = OVSamModel(whole).state_dict()
    state = {}
    for name, part in parts.items():
        own = [key.removeprefix(f"{name}.") for key in wanted if key.startswith(f"{name}.")]
        if missing := [key for key in own if key not in part.state]:
            raise InputError(f"{part.name} lacks {missing[0]} and {len(missing) - 1} more of the weights of a {name}.")
        state |= {f"{name}.{key}": part.state[key] for key in own}
    # from_pretrained assigns the tensors without initialising random weights first.
    model = OVSamModel.from_pretrained(None, config=whole, state_dict=state, dtype=torch.float32)
    return model.eval(), parts


def load_sam(given: str | PreTrainedModel, memory: bool = False) -> Part:
    """Load the configuration and weights of the SAM side; of a tracker without its memory, unless it is asked for.

    Raises:
        InputError: as in `compose`; or there is no memory that could be kept.
    """
    part, model = _open(given)
    kind = (model.config.sam_config if isinstance(model, OVSamModel) else part.config).model_type
    if memory and not issubclass(SAM_SIDES.get(kind, Sam2Side), Sam2VideoSide):
        raise InputError(
            f"{part.name!r} is a model of type {kind!r}, which has no memory to keep; pass one of sam2_video or "
            "edgetam_video."
        )
    if model is None:
        kind = kind if memory else TRACKERS.get(kind, kind)
        side = _side(SAM_SIDES, kind, part, "SAM")
        model = _load(part, side.model_class, None if memory else _image_config(part.config, side.model_class))
    if isinstance(model, OVSamModel):
        part.config, part.state = model.config.sam_config, model.sam.state_dict()
    else:
        part.config, part.state = model.config, _under_model(model)
    return _owned(part)


def load_clip(given: str | PreTrainedModel) -> Part:
    """Load the configuration and weights of the CLIP side."""
    if isinstance(given, str) and given.startswith(IMAGENET):
        return _imagenet(given)
    part, model = _open(given)
    if model is None and part.folder is not None and is_open_clip(part.folder):
        part.config, part.state = _open_clip(part.folder)
    elif model is None:
        side = _side(CLIP_SIDES, part.config.model_type, part, "CLIP")
        model = _load(part, side.model_class or side)
    if isinstance(model, OVSamModel):
        part.config, part.state = model.config.clip_config, model.clip.state_dict()
        part.settings = {name: getattr(model.config, name) for name in ("templates", "vocabulary")}
        if model.clip.has_concepts:
            part.settings |= {name: getattr(model.config, name) for name in CALIBRATED}
        return _owned(part)
    if model is not None:
        whole = isinstance(model, tuple(CLIP_SIDES.values()))  # an open_clip side written by save_pretrained
        part.config, part.state = model.config, model.state_dict() if whole else _under_model(model)
    side = CLIP_SIDES[part.config.model_type]
    part.settings = {"templates": side.templates, **side.settings}
    return _owned(part)


def _imagenet(name: str) -> Part:
    """Load a classifier of timm, with the text tower and the tokenizer of the embedded checkpoint."""
    folder = find_checkpoint("ovsam-tiny")
    classifier = name.removeprefix(IMAGENET)
    config, state = pretrained_imagenet(classifier, text_tower.text_config(), text_tower.embed_texts)
    text = text_tower.text_tower(folder)[0].text_model.state_dict()
    state |= {f"text_model.{key}": tensor for key, tensor in text.items()}
    return Part(name, config, state, folder, {"templates": ImageNetSide.templates})


def load_adapter(given: str | PreTrainedModel, kind: str) -> Part:
    """Load an adapter of a kind, "clip2sam", "sam2clip" or "concepts", also from the folder of a whole OVSam model."""
    part, model = _open(given)
    if model is None:
        if not part.config.model_type.startswith("ovsam_"):
            raise InputError(f"{part.name} was passed as {kind}, but it is a model of type {part.config.model_type}.")
        model = _load(part, AutoModel)
    if isinstance(model, OVSamModel):
        if kind == "concepts":
            part.settings = {name: getattr(model.config, name) for name in CALIBRATED}
        elif kind == "clip2sam":
            part.settings = {"name_calibration": model.config.name_calibration}
        model = getattr(model, kind)
    if model is None or not model.config.model_type.startswith(f"ovsam_{kind}"):
        found = f"no {kind}" if model is None else f"a {type(model).__name__}"
        raise InputError(f"{part.name} was passed as {kind}, but it has {found}.")
    part.config, part.state = model.config, model.state_dict()
    return _owned(part)


def describe(model: OVSamModel) -> str:
    """Describe in one sentence the abilities of a model and its missing parts."""
    has_clip, has_head = model.config.composition != "sam", model.concepts is not None
    brings_head = has_clip and model.clip.has_concepts
    if model.clip2sam is not None:
        names = "yes, by its Clip2SamAdapter"
    elif has_head or brings_head:
        names = "yes, by the locations that match them"
    else:
        names = "yes, by CLIP's own features" if has_clip else "no"
    if has_head or brings_head:
        words = f"yes, by {'its ConceptHead' if has_head else 'the CLIP side itself'}"
    else:
        words = "yes, by the proposer clip-dense" if has_clip else "only with a proposer such as detector:ID"
    missing = [name for name in ("clip2sam", "concepts") if getattr(model, name) is None]
    if brings_head:
        missing = []  # no adapter is required
    lacks = f"; missing: {' and '.join(missing)}, to be trained" if missing else "; missing: nothing"
    video = "memory" if isinstance(model.sam, Sam2VideoSide) else "label propagation"
    return f"Names of prompted masks: {names}; words and everything: {words}; video: by {video}{lacks}."


def licence(part: Part) -> str:
    """Return the licence in the card of a part; "not stated" without one."""
    card = part.folder and part.folder / "README.md"
    stated = (metadata_load(card) if card and card.is_file() else None) or {}
    name = stated.get("license_name") if stated.get("license") == "other" else stated.get("license")
    return name or "not stated"


def build_processor(model: OVSamModel, sam: Part, clip: Part, clip_size: int | None = None) -> OVSamProcessor:
    """Return the processor of a composed model; `clip_size` as in `compose`.

    Raises:
        InputError: a part is in memory, or its folder has no tokenizer.
    """
    if clip.folder is None:
        raise InputError("A model in memory has no tokenizer: pass a folder or a Hub id, or build an OVSamProcessor.")
    side, composition = model.clip, model.config.composition
    colours = {"image_mean": list(side.image_mean), "image_std": list(side.image_std)}
    images = _sam_images(model, colours if composition == "clip" else _sam_colours(sam))
    return OVSamProcessor(
        images,
        load_tokenizer(clip),
        clip_images=_clip_images(model, images, clip_size, colours) if composition == "dual" else None,
        max_text_length=side.max_text_length,
        text_padding=side.text_padding,
    )


def _open(given: str | PreTrainedModel) -> tuple[Part, PreTrainedModel | None]:
    """Return a part without its weights; and the model, if it is a whole one or in memory."""
    if not isinstance(given, str | os.PathLike | PreTrainedModel):
        raise InputError(f"A part is {short(given)}; it must be a folder, a Hub id or a model in memory.")
    given = given if isinstance(given, PreTrainedModel) else os.fsdecode(given)
    if not isinstance(given, str):
        return Part(type(given).__name__, given.config, {}), given
    folder = fetch(given)
    check_weights(folder)
    part = Part(given, PreTrainedConfig(), {}, folder)
    if is_open_clip(folder):
        return part, None
    check_configs(folder, given, part=True)
    try:
        part.config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a configuration class may raise anything over values it does not expect
        raise InputError(f"{given!r} has no readable configuration: {reason_of(error)}") from error
    return part, _load(part, OVSamModel) if part.config.model_type == OVSamConfig.model_type else None


def _load(part: Part, model_class: Any, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    given = {} if config is None else {"config": config}
    try:
        model, found = model_class.from_pretrained(part.folder, dtype=torch.float32, output_loading_info=True, **given)
    except Exception as error:  # likewise
        raise InputError(f"{part.name!r} cannot be loaded as a {model_class.__name__}: {reason_of(error)}") from error
    if missing := sorted(found["missing_keys"]):  # transformers has initialised them at random
        raise InputError(f"{part.name!r} lacks {len(missing)} of its weights, such as {missing[0]}.")
    return model


def _side(sides: dict[str, Any], kind: str, part: Part, what: str) -> Any:
    if kind not in sides:
        found = f"a model of type {kind!r}" if kind else "an open_clip model"
        raise InputError(f"{part.name!r} is {found}; a {what} must be one of {', '.join(sides)}.")
    if not hasattr(sides[kind].model_class or sides[kind], "from_pretrained"):
        raise InputError(f"{part.name!r} is a {what} of a whole OVSam model; pass the folder of that model.")
    return sides[kind]


def _image_config(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedConfig | None:
    """Return the configuration of the image model of a tracker; None for other configurations."""
    if config.model_type not in TRACKERS:
        return None
    config = getattr(config, "tracker_config", config)  # SAM 3 is a detector and a tracker
    names = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    return model_class.config_class(**{name: _numbers(getattr(config, name)) for name in names})


def _numbers(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a part; the tracker's model_type is dropped, except for vision encoders."""
    return {name: value for name, value in config.to_dict().items() if name != "model_type" or "vision" in value}


def _under_model(model: PreTrainedModel) -> dict[str, Tensor]:
    return {f"model.{key}": value for key, value in model.state_dict().items()}


def _owned(part: Part) -> Part:
    """Copy a part in memory, so that the composed model does not share its weights and configuration."""
    if part.folder is None:
        part.state = {key: value.detach().clone() for key, value in part.state.items()}
        part.config = type(part.config).from_dict(part.config.to_dict())
    return part


def _open_clip(folder: Path) -> tuple[OpenClipConfig, dict[str, Tensor]]:
    """Read the layout of open_clip on the Hub: open_clip_config.json and open_clip_model.safetensors."""
    import open_clip  # here, since it takes long to import

    settings = json.loads((folder / "open_clip_config.json").read_text())
    preprocess = settings.get("preprocess_cfg", {})
    colours = {f"image_{key}": preprocess[key] for key in ("mean", "std") if key in preprocess}
    state = open_clip.model.convert_to_custom_text_state_dict(load_file(folder / OPEN_CLIP))
    return OpenClipConfig(model_cfg=settings["model_cfg"], **colours), {f"model.{key}": state[key] for key in state}


def _with_sub_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _with_sub_configs(value)


def _sam_colours(part: Part) -> dict[str, list[float]]:
    """Return the mean and deviation that SAM was trained with, if its folder has them."""
    try:
        found = AutoImageProcessor.from_pretrained(part.folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError):
        return {}
    return {"image_mean": list(found.image_mean), "image_std": list(found.image_std)}


def _sam_images(model: OVSamModel, colours: dict[str, list[float]]) -> Any:
    """Return the image processor of the square input: SAM 1 pads, later models resize without the aspect ratio."""
    size = model.sam.image_size
    square, small = {"height": size, "width": size}, {"height": size // 4, "width": size // 4}
    kind = model.sam.image_processor
    if kind is SamImageProcessor:
        edges = {"size": {"longest_edge": size}, "mask_size": {"longest_edge": size // 4}}
        return kind(**edges, pad_size=square, mask_pad_size=small, **colours)
    return kind(size=square, mask_size=small, **colours)


def _clip_images(model: OVSamModel, images: Any, clip_size: int | None, colours: dict[str, list[float]]) -> dict | None:
    """Return the configuration of the stock image processor that prepares CLIP's input from the whole image; None if
    that is the model input."""
    side: ClipSide = model.clip
    if clip_size is None:
        same_stride = len(set(side.strides)) == 1
        clip_size = side.image_size if same_stride else model.sam.image_size
    size = {"height": clip_size, "width": clip_size}
    own = {"image_mean": list(images.image_mean), "image_std": list(images.image_std)}
    squashed = isinstance(images, Sam2ImageProcessor) and not side.image_processor.get("do_pad")
    if squashed and clip_size == model.sam.image_size and own == colours:
        return None
    return {**side.image_processor, "size": size, **colours}


def load_tokenizer(part: Part) -> Any:
    """Return the tokenizer of a CLIP part.

    Raises:
        InputError: its folder has no tokenizer.
    """
    try:
        return AutoTokenizer.from_pretrained(part.folder, trust_remote_code=False)
    except Exception as error:  # likewise
        model_cfg = getattr(part.config, "model_cfg", None)
        if model_cfg is not None and "hf_tokenizer_name" not in model_cfg["text_cfg"]:
            return clip_tokenizer()  # part of open_clip, not of the weights
        raise InputError(f"{part.name!r} has no tokenizer that can be loaded; text queries need one.") from error
