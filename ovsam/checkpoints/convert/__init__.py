"""`ovsam convert`: checkpoints in their authors' own layouts -> folders that transformers loads."""

import re
from pathlib import Path

import torch

from ovsam.checkpoints.convert.base import Kind, Report, check_model, map_tensors, new_folder, read_tensors, write_model
from ovsam.checkpoints.convert.edgetam import EDGETAM
from ovsam.checkpoints.convert.efficienttam import EFFICIENTTAM
from ovsam.checkpoints.convert.open_vocabulary_sam import convert_open_vocabulary_sam
from ovsam.checkpoints.convert.sam import SAM
from ovsam.checkpoints.convert.sam2 import SAM2
from ovsam.errors import InputError

KINDS: dict[str, Kind] = {"sam": SAM, "sam2": SAM2, "edgetam": EDGETAM, "efficienttam": EFFICIENTTAM}

__all__ = ["KINDS", "Kind", "Report", "convert_checkpoint", "map_tensors", "new_folder", "read_tensors"]


def convert_checkpoint(
    source: str | Path, output: str | Path, kind: str | None = None, image_size: int | None = None
) -> Report:
    """Convert a foreign checkpoint to a new folder of config.json, model.safetensors and the processor's file.

    The folder is loaded back, its weights are compared bit by bit with the source's and the model is run before the
    folder takes its name; if anything fails, nothing is left.

    Args:
        source: the file as its authors published it, or its state dict as safetensors; or the folder of the released
            Open-Vocabulary SAM, see `open_vocabulary_sam`.
        output: a folder that does not exist or is empty.
        kind: one of KINDS; found from the names of the tensors if not given.
        image_size: side in pixels of the square images it was trained on, where that is not 1024 and the tensors do
            not tell.

    Raises:
        InputError: the file is of no known kind, a tensor is missing, misplaced, misshapen or not finite, or what was
            written does not give the source back.
    """
    if kind not in (None, *KINDS):
        raise InputError(f"No kind is named {kind!r}; there are {', '.join(KINDS)}.")
    if Path(source).is_dir():
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
    raise InputError(f"{source} is of no known kind (its first tensor is {next(iter(tensors))!r}); known are: {known}.")
