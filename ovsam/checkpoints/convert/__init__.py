"""`ovsam convert`: official checkpoints -> folders that transformers loads."""

import os
import re
from pathlib import Path

import torch

from ovsam.checkpoints.convert.base import (
    CheckpointLayout,
    Report,
    check_model,
    map_tensors,
    new_folder,
    read_tensors,
    write_model,
)
from ovsam.checkpoints.convert.edgetam import EDGETAM
from ovsam.checkpoints.convert.efficienttam import EFFICIENTTAM
from ovsam.checkpoints.convert.open_vocabulary_sam import convert_open_vocabulary_sam
from ovsam.checkpoints.convert.sam import SAM
from ovsam.checkpoints.convert.sam2 import SAM2
from ovsam.errors import InputError

KINDS: dict[str, CheckpointLayout] = {"sam": SAM, "sam2": SAM2, "edgetam": EDGETAM, "efficienttam": EFFICIENTTAM}

__all__ = ["KINDS", "CheckpointLayout", "Report", "convert_checkpoint", "map_tensors", "new_folder", "read_tensors"]


def convert_checkpoint(
    source: str | Path, output: str | Path, kind: str | None = None, image_size: int | None = None
) -> Report:
    """Convert an official checkpoint to a new folder of config.json, model.safetensors and the processor's file.

    The folder is loaded back, its weights are compared bit by bit with the source and the model is run before the
    folder gets its name; after an error nothing is left.

    Args:
        source: the published file, or its state dict as safetensors; or the folder of the released Open-Vocabulary SAM,
            see `open_vocabulary_sam`.
        output: a folder that does not exist or is empty.
        kind: one of KINDS; by default recognised from the names of the tensors.
        image_size: side in pixels of the square images in training, if it is not 1024 and the tensors do not determine
            it.

    Raises:
        InputError: the kind of the file is unknown; a tensor is missing, unexpected, of another shape or not finite; or
            the written folder does not equal the source.
    """
    if kind not in (None, *KINDS):
        raise InputError(f"There is no kind {kind!r}; choose one of {', '.join(KINDS)}.")
    if os.path.isdir(source):
        return convert_open_vocabulary_sam(source, output)
    with new_folder(output) as folder:
        source_tensors, beside = read_tensors(source)
        name = kind or _recognise(source, source_tensors)
        layout = KINDS[name]
        size, config = layout.read_config(source_tensors, image_size)
        with torch.device("meta"):
            expected = layout.model_classes[0](config).state_dict()
        prepared = layout.prepare(source_tensors, config) if layout.prepare else source_tensors
        tensors, unused = map_tensors(prepared, expected, layout.renames, layout.unused)
        write_model(layout, config, tensors, folder)
        check_model(layout, tensors, folder)
    classes = tuple(model_class.__name__ for model_class in layout.model_classes)
    return Report(name, size, len(source_tensors) - len(unused), unused | beside, classes)


def _recognise(source: str | Path, tensors: dict) -> str:
    for name, kind in KINDS.items():
        if all(any(re.search(mark, key) for key in tensors) for mark in kind.marks):
            return name
    known = "; ".join(kind.title for kind in KINDS.values())
    raise InputError(
        f"{source} is of an unknown kind (its first tensor is {next(iter(tensors))!r}); known kinds: {known}."
    )
