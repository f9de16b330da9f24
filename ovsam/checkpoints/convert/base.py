"""Shared steps of the conversions: read an official file, map every key, write a complete folder or nothing."""

import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ovsam.errors import InputError
from ovsam.ops.files import check_new_folder

Renames = Sequence[tuple[str, str]]


def _answer(model: PreTrainedModel, pixel_values: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    output = model(pixel_values=pixel_values, input_points=points)
    return output.pred_masks, output.iou_scores


@dataclass(frozen=True)
class CheckpointLayout:
    """One layout of official checkpoints, and its conversion to a model of transformers.

    Attributes:
        title: name in messages.
        marks: patterns; a state dict is of this kind if each of them is found in one of its keys.
        read_config: function from the tensors, and the side of the square input in pixels if the user gave one, to the
            name of the size and the configuration of `model_classes[0]`; raises InputError for an unknown size.
        renames: mapping of keys to those of the model, see `map_tensors`.
        unused: (pattern, reason) of keys that the model does not use.
        model_classes: the first one is written, and each must load the folder; the last takes prompts on images.
        processor: function from the side of the square input to the processor that is written with the model.
        prepare: function that changes tensors where renaming is not enough, given the configuration.
        answer: function from model, images [1, 3, side, side] and points [1, 1, 1, 2] to masks and predicted IoU.
    """

    title: str
    marks: tuple[str, ...]
    read_config: Callable[[Mapping[str, Tensor], int | None], tuple[str, PreTrainedConfig]]
    renames: Renames
    model_classes: tuple[type[PreTrainedModel], ...]
    processor: Callable[[int], ProcessorMixin]
    unused: Renames = ()
    prepare: Callable[[dict[str, Tensor], PreTrainedConfig], dict[str, Tensor]] | None = None
    answer: Callable[[PreTrainedModel, Tensor, Tensor], tuple[Tensor, Tensor]] = _answer


@dataclass
class Report:
    """Summary of a conversion.

    Attributes:
        kind: kind of the source.
        size: name of the size, as in the publication.
        used: number of tensors of the source that are in the folder.
        unused: reason for each key that is not.
        classes: names of the classes that load the folder.
    """

    kind: str
    size: str
    used: int
    unused: dict[str, str]
    classes: tuple[str, ...]


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state dict of a file of PyTorch or safetensors, and the reason for each other entry of the file.

    The state dict may be the file itself or its entry "model" or "state_dict". Only tensors and plain containers are
    unpickled.

    Raises:
        InputError: the file does not exist, or has no readable state dict.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise InputError(f"{path} is not a file; give a checkpoint such as sam2.1_hiera_tiny.pt.")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    except Exception as error:  # the unpickler raises whatever the bytes of another kind of file lead to
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(
                f"{path} holds an object of {found[1]}, which could run code on loading; save the state dict "
                "alone, best as safetensors."
            ) from None
        raise InputError(f"{path} is damaged or not a checkpoint of PyTorch or safetensors.") from None
    unused = {}
    for wrapper in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            unused = {key: f"is outside the state dict {wrapper!r}" for key in content if key != wrapper}
            content = content[wrapper]
    entries = content.items() if isinstance(content, dict) else ()
    tensors = {key: value for key, value in entries if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{path} holds no state dict, neither by itself nor under 'model' or 'state_dict'.")
    return tensors, unused | {key: "is not a tensor" for key in content.keys() - tensors.keys()}


def map_tensors(
    source: Mapping[str, Tensor], expected: Mapping[str, Tensor], renames: Renames, unused: Renames = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map an official state dict to ours: every tensor is used or listed as unused, and none of ours is missing.

    Args:
        source: official state dict; tensors on the "meta" device are mapped by name and shape.
        expected: our state dict, of which only shapes and dtypes are read.
        renames: (pattern, replacement) of `re.sub`, applied to a key in order. The result is a key of ours, or

            - `a = b`: the tensor is stored under both keys;
            - `a.{k,v}.b`: the tensor is split along its first axis into equal parts, a.k.b and a.v.b;
            - `a[2]`: the tensor is part 2 of a, whose parts are concatenated along the first axis.
        unused: (pattern, reason) of keys to leave out.

    Returns:
        our state dict, with the dtypes of `expected` (it may share memory with the source), and the reason for each key
        of the source that is not in it.

    Raises:
        InputError: a tensor is missing, unexpected, of another shape, or not finite; the message names it.
    """
    parts: dict[str, dict[int, Tensor]] = {}
    origins: dict[str, str] = {}
    left_out = {}
    for key, tensor in source.items():
        reason = next((reason for pattern, reason in unused if re.search(pattern, key)), None)
        if reason:
            left_out[key] = reason
            continue
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            raise InputError(f"The tensor {key!r} holds NaN or infinite numbers; the file is damaged.")
        for name, part in _place(key, tensor, renames):
            name, index = re.fullmatch(r"(.+?)(?:\[(\d+)])?", name).groups(default="0")
            if name not in expected:
                raise InputError(f"The tensor {key!r} has no place in this kind of model (it would be {name!r}).")
            if int(index) in parts.setdefault(name, {}):
                raise InputError(f"The tensors {origins[name]!r} and {key!r} would have the same place, {name!r}.")
            parts[name][int(index)] = part
            origins[name] = key

    mapped = {}
    for name, like in expected.items():
        if name not in parts:
            raise InputError(f"A tensor is missing: none of the source becomes {name!r}.")
        pieces = [parts[name][index] for index in sorted(parts[name])]
        tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if tensor.shape != like.shape:
            raise InputError(
                f"The tensor {origins[name]!r} gives {name!r} the shape {list(tensor.shape)}, where "
                f"{list(like.shape)} is expected."
            )
        mapped[name] = tensor.to(like.dtype).contiguous()
    return mapped, left_out


def _place(key: str, tensor: Tensor, renames: Renames) -> list[tuple[str, Tensor]]:
    name = key
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    if braces := re.search(r"\{(.+)}", name):
        names = [name[: braces.start()] + choice + name[braces.end() :] for choice in braces[1].split(",")]
        if len(tensor) % len(names):
            raise InputError(
                f"The tensor {key!r} of shape {list(tensor.shape)} cannot be split into {len(names)} equal parts."
            )
        return list(zip(names, tensor.chunk(len(names)), strict=True))
    name, *aliases = name.split(" = ")
    return [(name, tensor), *((alias, tensor.clone()) for alias in aliases)]  # safetensors does not store shared memory


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder, which gets its name if the block succeeds and is deleted otherwise.

    Raises:
        InputError: the name is that of a file or of a folder that is not empty, or its parent does not exist.
    """
    check_new_folder(path)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        folder = Path(scratch) / path.name
        folder.mkdir()
        yield folder
        if path.exists():
            path.rmdir()
        folder.rename(path)


def write_model(kind: CheckpointLayout, config: PreTrainedConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write config.json, model.safetensors and the processor's file."""
    with torch.device("meta"):
        model = kind.model_classes[0](config)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.config.dtype = "float32"
    model.save_pretrained(folder)
    kind.processor(config.prompt_encoder_config.image_size).save_pretrained(folder)


def check_model(kind: CheckpointLayout, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Load the folder with every class of its kind, compare all weights bit by bit, and run the model on a point.

    Raises:
        InputError: a weight is missing or differs, or masks or scores are not finite.
    """
    for model_class in kind.model_classes:
        model = load_back(model_class, tensors, folder)
    side = model.config.prompt_encoder_config.image_size
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        masks, iou = kind.answer(model.eval(), pixels, torch.full((1, 1, 1, 2), side / 2))
    if not (masks.isfinite().all() and iou.isfinite().all()):
        raise InputError("The converted model's masks are not finite; the file is damaged or of another kind.")


def load_back(model_class: type[PreTrainedModel], tensors: Mapping[str, Tensor], folder: Path) -> PreTrainedModel:
    """Load the model of a folder; raises InputError unless its weights equal the tensors bit by bit."""
    model, found = model_class.from_pretrained(folder, output_loading_info=True)
    wrong = [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]
    loaded = model.state_dict()
    wrong += [name for name in loaded if name not in tensors or not torch.equal(loaded[name], tensors[name])]
    if wrong:
        raise InputError(
            f"The written folder does not equal its source: {wrong[0]!r} differs in {model_class.__name__}."
        )
    return model.eval()


def shape_of(tensors: Mapping[str, Tensor], key: str, axes: int | None = None) -> torch.Size:
    """Return the shape of a tensor; raises InputError if it is missing or has another number of axes."""
    if key not in tensors:
        raise InputError(f"The tensor {key!r} is missing.")
    shape = tensors[key].shape
    if axes is not None and len(shape) != axes:
        raise InputError(f"The tensor {key!r} has the shape {list(shape)}, where {axes} axes are expected.")
    return shape


def count_blocks(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Return the number of blocks `prefix`N., complete or not."""
    numbers = [key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)]
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)
