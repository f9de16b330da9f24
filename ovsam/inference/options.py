"""Checks of the arguments of `ovsam.load` and `Segmenter`; InputError states what would be right.

torch is imported by the checks that need it.
"""

import glob
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ovsam.errors import InputError
from ovsam.ops.nms import NMS
from ovsam.processing import arguments
from ovsam.processing.vocabulary import Vocabulary, to_vocabulary

if TYPE_CHECKING:
    import torch

PROPOSERS = ("concepts", "clip-dense", "grid")  # they need only the model
LOADED_PROPOSERS = ("detector", "sam3")  # "detector:ID", loaded from a folder or the Hub

# Device files of NVIDIA, WSL, AMD and Jetson; without any of them, torch finds no GPU on Linux.
GPU_FILES = ("/dev/nvidia*", "/dev/dxg", "/dev/kfd", "/dev/nvhost*", "/dev/nvmap", "/dev/nvgpu*")


def is_absent(kind: str) -> bool:
    """Whether there is certainly no device of a kind on this machine; needs no torch."""
    if kind == "cuda":
        return sys.platform == "darwin" or sys.platform == "linux" and not any(map(glob.glob, GPU_FILES))
    return kind == "mps" and sys.platform != "darwin"


def check_device(device: "str | torch.device") -> "torch.device":
    """The device, once a tensor was made on it."""
    import torch

    try:
        target = torch.device(device)
        torch.empty(0, device=target)
        if target.type == "meta":
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        shown = arguments.short(device if isinstance(device, str) else str(device))
        raise InputError(f"The device {shown} cannot be used here; `cpu` always works.") from error
    return target


def check_dtype(dtype: "str | torch.dtype | None") -> "torch.dtype | None":
    import torch

    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    known = (torch.float32, torch.float16, torch.bfloat16)
    if dtype is not None and not (isinstance(found, torch.dtype) and found in known):
        raise InputError(f"The dtype is {arguments.short(dtype)}; it must be float32, float16 or bfloat16.")
    return found


def names_of(call: Callable) -> list[str]:
    """The arguments that a method takes by name, without those of **."""
    taken = inspect.signature(call).parameters.values()
    return [one.name for one in taken if one.name != "self" and one.kind != one.VAR_KEYWORD]


def check_options(post: dict[str, Any]) -> dict[str, Any]:
    """Check and return the options of post-processing; raises InputError."""
    if post.get("nms") is not None:
        arguments.choice("NMS", post["nms"], NMS)
    for name in ("per_word", "rescore", "exclusive"):
        arguments.flag(name, post.get(name, False))
    arguments.number("mask_threshold", post["mask_threshold"], 0, 1, inside=True)
    arguments.whole("top_k", post["top_k"], 0)
    return post


def check_share(name: str, value: Any) -> float | None:
    return arguments.optional(arguments.number, name, value, 0, 1)


def check_tile(tile: Any) -> int | None:
    none = tile is None or tile is False or isinstance(tile, int) and tile == 0
    return None if none else arguments.whole("tile", tile, arguments.MIN_TILE)


def check_proposer(proposer: Any) -> Any:
    """Check and return a proposer: a name, a function, or None."""
    if proposer is None or callable(proposer):
        return proposer
    if not isinstance(proposer, str):
        raise InputError(f"The proposer is {arguments.short(proposer)}; it must be a name, a function or None.")
    check_proposer_name(proposer)
    return proposer


def check_proposer_name(name: str) -> str:
    """Raises InputError unless a proposer may have this name; nothing is loaded."""
    kind, _, model_id = name.partition(":")
    if name not in PROPOSERS and (kind not in LOADED_PROPOSERS or not model_id):
        names = ", ".join((*PROPOSERS, *(f"{kind}:ID" for kind in LOADED_PROPOSERS)))
        raise InputError(f"There is no proposer {arguments.short(name)}; there are {names}, and functions of your own.")
    return name


def check_negative(negative: Any) -> Vocabulary | None:
    """The negative queries; None for none."""
    negative = arguments.plain(negative)
    if negative is None or not isinstance(negative, Vocabulary) and negative in ("", (), []):
        return None
    return to_vocabulary(negative)


def check_exemplars(given: Any) -> dict[str, list[tuple[Any, list[float]]]]:
    """Exemplars as a list of (image, box) for each label; the image is None if it is the one that is searched."""
    if given is None:
        return {}
    found: dict[str, list[tuple[Any, list[float]]]] = {}
    for label, some in (given if isinstance(given, Mapping) else {"exemplar": given}).items():
        if not isinstance(label, str) or not label.strip():
            raise InputError(f"An exemplar's label is {arguments.short(label)}; it must be a non-empty string.")
        some = arguments.plain(some)
        if isinstance(some, tuple) and len(some) == 2 and not arguments.is_number(some[0]):
            some = [some]  # one (image, box)
        elif arguments.is_sequence(some) and some and all(arguments.is_number(one) for one in some):
            some = [some]  # one box
        if not arguments.is_sequence(some):
            raise InputError(f"The exemplars are {arguments.short(some)}; they must be boxes, or pairs (image, box).")
        pairs = []
        for one in some:
            on, box = one if arguments.is_sequence(one) and len(one) == 2 else (None, one)
            if on is None and arguments.is_sequence(one) and len(one) == 2:
                raise InputError("The image of an exemplar (image, box) is None; pass the box alone.")
            boxes = arguments.boxes(box, "exemplars")
            if len(boxes) != 1:
                raise InputError(f"The exemplars hold {arguments.short(one)}; each must be one box, or (image, box).")
            pairs.append((on, boxes[0]))
        if pairs:
            found[label] = pairs
    return found
