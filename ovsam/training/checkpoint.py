"""Checkpoints and models are written completely or not at all: into another folder that is then renamed."""

import shutil
from pathlib import Path

from ovsam.inference.segmenter import Segmenter
from ovsam.modeling.adapters import ADAPTERS

SAVING = ".saving"  # what a killed run leaves in it is never read


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def publish_checkpoint(folder: Path, name: str) -> None:
    """Rename a finished `SAVING/name` to `name`, then delete the earlier checkpoints."""
    target = folder / name
    (folder / SAVING / name).rename(target)
    clear_saving(folder)
    for old in list_checkpoints(folder):
        if old != target:
            shutil.rmtree(old)


def clear_saving(folder: Path) -> None:
    shutil.rmtree(folder / SAVING, ignore_errors=True)


def write_model(segmenter: Segmenter, folder: Path) -> None:
    """Write a whole model as a folder that loads by itself (weights, configuration, processor, tokenizer, shim), with a
    folder for each of its adapters. The weights are written last: if they exist, the other files do."""
    saving, model = folder / SAVING, segmenter.model
    clear_saving(folder)
    model.save_pretrained(saving)
    segmenter.processor.save_pretrained(saving)
    for name in ADAPTERS:
        if getattr(model, name, None) is not None:
            getattr(model, name).save_pretrained(saving / name)
    for part in sorted(saving.iterdir(), key=lambda path: path.name.startswith("model.safetensors")):
        target = folder / part.name
        if target.is_dir():
            shutil.rmtree(target)
        part.replace(target)
    clear_saving(folder)
