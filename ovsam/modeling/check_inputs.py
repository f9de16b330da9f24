"""Types and levels of the arguments of OVSamModel, checked before anything is computed.

Only what torch.compile and tracing know beforehand is read: types, numbers of levels, and lengths that are fixed by the
form. Numbers of images and prompts are compared where they are used (`check_prompts` of the SAM side).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ovsam.errors import InputError
from ovsam.modeling.outputs import OVSamFeatures

FORMS = {  # name -> form, and whether it holds floating-point values, whole numbers (False) or either (None)
    "pixel_values": ("[B, 3, H, W]", True),
    "clip_pixel_values": ("[B, 3, H, W]", True),
    "clip_window": ("[B, 4]", True),
    "input_ids": ("[K, T]", False),
    "attention_mask": ("[K, T]", None),
    "text_embeds": ("[K, D]", True),
    "input_points": ("[B, P, N, 2]", None),
    "input_labels": ("[B, P, N]", None),
    "input_boxes": ("[B, P, 4]", None),
    "input_masks": ("[B, P, H, W]", True),
}
KINDS = {True: "floating-point tensor", False: "tensor of whole numbers", None: "tensor"}


def tensors(**given: Any) -> None:
    """Raise InputError for an argument that is no tensor of its form; None stands for none."""
    for name, value in given.items():
        if value is None:
            continue
        form, floating = FORMS[name]
        sides = form.strip("[]").split(", ")
        fits = isinstance(value, Tensor) and value.ndim == len(sides)
        fits = fits and all(not side.isdigit() or value.shape[i] == int(side) for i, side in enumerate(sides))
        if not fits or floating is not None and floating != value.is_floating_point():
            kind = KINDS[floating]
            raise InputError(f"The {name} must be a {kind} {form}, as of the processor; got {_describe(value)}.")


def weights(model: nn.Module) -> None:
    """Raise InputError where accelerate has offloaded weights: modules of SAM in transformers read weights of their
    submodules, which accelerate loads for the calls of these submodules only."""
    if hasattr(model, "_hf_hook") and any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(
            "Weights of the model are offloaded to the CPU or a disk, which SAM in transformers does not support; load "
            "the model on one device, or offload all of it by accelerate.cpu_offload(model, "
            "preload_module_classes=['OVSamModel'])."
        )


def labels(**given: Any) -> None:
    """Raise InputError for text queries that are no list or mapping."""
    for name, value in given.items():
        if value is not None and (isinstance(value, str) or not isinstance(value, Sequence | Mapping)):
            raise InputError(f"The {name} must be a list of strings, as of the processor; got {_describe(value)}.")


def options(features: Any, image_embeddings: Any, prompt_counts: Any, proposal_threshold: Any) -> None:
    """Raise InputError for the other arguments of OVSamModel where they have a wrong type."""
    if features is not None and not isinstance(features, OVSamFeatures):
        raise InputError(f"The features must be those that `encode` returns; got {_describe(features)}.")
    maps = image_embeddings if isinstance(image_embeddings, list | tuple) else [None]
    if image_embeddings is not None and not (maps and all(isinstance(one, Tensor) for one in maps)):
        got = _describe(image_embeddings)
        raise InputError(f"The image_embeddings must be those that `get_image_embeddings` returns; got {got}.")
    if prompt_counts is not None and not isinstance(prompt_counts, Tensor | list | tuple):
        got = _describe(prompt_counts)
        raise InputError(f"The prompt_counts must be a whole number for each image, as of the processor; got {got}.")
    if proposal_threshold is not None and not isinstance(proposal_threshold, int | float):
        raise InputError(f"The proposal_threshold must be a number; got {_describe(proposal_threshold)}.")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"a value of type {type(value).__name__}"
