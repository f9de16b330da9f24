"""Data sets to train on: a reader for each format, all giving the same samples (see `base`)."""

import inspect
from collections.abc import Callable
from typing import Any

from ovsam.data.base import Sample, SegmentationData, outlined
from ovsam.data.coco import Coco
from ovsam.data.emojiscenes import SceneDataset, open_scenes
from ovsam.data.folders import Folders
from ovsam.data.huggingface import HuggingFace
from ovsam.data.lvis import Lvis
from ovsam.data.mixture import Mixture, SharedWords, merge_words
from ovsam.data.pictures import PictureData
from ovsam.data.sa1b import Sa1b
from ovsam.data.scenes.drawing import SceneConfig
from ovsam.errors import InputError

__all__ = [
    "READERS",
    "Coco",
    "Folders",
    "HuggingFace",
    "Lvis",
    "Mixture",
    "PictureData",
    "Sa1b",
    "Sample",
    "SceneDataset",
    "SegmentationData",
    "SharedWords",
    "merge_words",
    "open_data",
    "outlined",
    "reader_keys",
]


def open_data(config: dict[str, Any]) -> SegmentationData:
    """The data set of a recipe's [data] table.

    Args:
        config: `format`, a key of READERS (default emojiscenes), and its reader's own keys.

    Raises:
        InputError: no such format, a key that its reader does not take or lacks, and whatever the reader finds wrong.
    """
    options = dict(config)
    kind = options.pop("format", "emojiscenes")
    if kind not in READERS:
        raise InputError(f"[data] has the format {kind!r}; there are {', '.join(READERS)}.")
    accepted = reader_keys(kind)
    if unknown := options.keys() - accepted.keys():
        raise InputError(f"[data] has {min(unknown)!r}, which {kind} does not know; it takes {', '.join(accepted)}.")
    if missing := [key for key, needed in accepted.items() if needed and key not in options]:
        raise InputError(f"[data] lacks {', '.join(missing)}, which the format {kind} needs.")
    return READERS[kind](**options)


def open_mixture(
    sets: list[dict[str, Any]],
    size: int | None = None,
    max_objects: int | None = None,
    seed: int = 0,
    length: int | None = None,
) -> Mixture:
    """A mixture by a recipe's keys: a [[data.sets]] table for each set, with its `share` (default 1).

    `size`, `max_objects` and `seed` are for the sets that do not say theirs.
    """
    common = {"size": size, "max_objects": max_objects, "seed": seed}
    shared = {key: value for key, value in common.items() if value is not None}
    opened = [open_data(shared | {key: v for key, v in own.items() if key != "share"}) for own in sets]
    return Mixture(opened, [own.get("share", 1.0) for own in sets], seed, length)


READERS: dict[str, Callable[..., SegmentationData]] = {
    "emojiscenes": open_scenes,
    "coco": Coco,
    "lvis": Lvis,
    "sa1b": Sa1b,
    "folders": Folders,
    "huggingface": HuggingFace,
    "mixture": open_mixture,
}


def reader_keys(kind: str) -> dict[str, bool]:
    """The keys that a format's reader takes, and whether it needs them."""
    reader = READERS[kind]
    # What a reader does not take itself it hands on: to its parent class, or open_scenes to SceneConfig.
    chain: list[Any] = list(reader.__mro__) if isinstance(reader, type) else [reader, SceneConfig]
    keys: dict[str, bool] = {}
    for owner in chain:
        parameters = inspect.signature(owner).parameters.values()
        for parameter in parameters:
            if parameter.kind is not parameter.VAR_KEYWORD and parameter.name != "words":
                keys.setdefault(parameter.name, parameter.default is parameter.empty)
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            break
    return keys
