"""Data sets for training: a reader for each format, all with the same samples (see `base`)."""

from collections.abc import Callable
from typing import Any

from ovsam.data.base import Sample, SegmentationData, outlined
from ovsam.data.coco import Coco
from ovsam.data.emojiscenes import SceneDataset, open_scenes
from ovsam.data.folders import Folders
from ovsam.data.huggingface import HuggingFace
from ovsam.data.lvis import Lvis
from ovsam.data.mixture import Mixture, SharedWords, merge_words
from ovsam.data.moving import MovingScenes
from ovsam.data.pictures import PictureData
from ovsam.data.sa1b import Sa1b
from ovsam.data.scenes.drawing import SceneConfig
from ovsam.errors import InputError
from ovsam.ops.arguments import accepted_arguments, check_arguments

__all__ = [
    "READERS",
    "Coco",
    "Folders",
    "HuggingFace",
    "Lvis",
    "Mixture",
    "MovingScenes",
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
    """Open the data set of a recipe's [data] table.

    Args:
        config: `format`, a key of READERS (default emojiscenes), and the keys of its reader.

    Raises:
        InputError: the format is unknown, a key is unknown or missing, or the reader finds an error.
    """
    options = dict(config)
    kind = options.pop("format", "emojiscenes")
    if not isinstance(kind, str) or kind not in READERS:
        raise InputError(f"[data] has the format {kind!r}; choose one of {', '.join(READERS)}.")
    accepted = reader_keys(kind)
    if unknown := options.keys() - accepted.keys():
        raise InputError(f"[data] has {min(unknown)!r}, which {kind} does not take; it takes {', '.join(accepted)}.")
    if missing := [key for key, needed in accepted.items() if needed and key not in options]:
        raise InputError(f"[data] lacks {', '.join(missing)}, which the format {kind} needs.")
    check_arguments(options, _chain(kind), f"[data] of format {kind}")
    return READERS[kind](**options)


def open_mixture(
    sets: list[dict[str, Any]],
    size: int | None = None,
    max_objects: int | None = None,
    seed: int = 0,
    length: int | None = None,
) -> Mixture:
    """Open a mixture by the keys of a recipe: a [[data.sets]] table for each set, with its `share` (default 1).

    `size`, `max_objects` and `seed` are the defaults of the sets.
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
    "moving": MovingScenes,
}


def reader_keys(kind: str) -> dict[str, bool]:
    """Return the keys of a format's reader, and whether each is required."""
    accepted = accepted_arguments(_chain(kind))
    return {name: one.default is one.empty for name, one in accepted.items() if name != "words"}


def _chain(kind: str) -> list[Any]:
    """The functions that take the keys of a format: further keys are passed on to the parent class, or by open_scenes
    to SceneConfig."""
    reader = READERS[kind]
    return list(reader.__mro__) if isinstance(reader, type) else [reader, SceneConfig]
