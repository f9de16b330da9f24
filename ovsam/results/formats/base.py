"""Shared code of the label formats: the records that readers return, numbers of labels, names of label files."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from ovsam.errors import InputError
from ovsam.ops import rle
from ovsam.ops.files import only_files
from ovsam.processing import arguments
from ovsam.processing.images import open_file, orientation_of, stored_size
from ovsam.results.instance import Instance

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")


class Labelled(Protocol):
    """One image with its instances: `Results`, or the output of a reader."""

    size: tuple[int, int]
    file_name: str | None
    model: str

    def __iter__(self) -> Iterator[Instance]: ...


@dataclass
class LabelledImage:
    """One image of a label file: `size` is height and width in pixels."""

    size: tuple[int, int]
    file_name: str | None
    instances: list[Instance] = field(default_factory=list)
    model: str = ""

    def __iter__(self) -> Iterator[Instance]:
        return iter(self.instances)

    def add(self, label: str, label_id: int, segmentation: rle.RLE, **known: Any) -> None:
        """Append an instance; fields that a format lacks take the values of a manual annotation."""
        kept: dict[str, Any] = {"score": 1.0, "mask_score": 1.0, "prompt": label, "source": "file", "topk": []} | known
        kept["topk"] = [(str(name), float(score)) for name, score in kept["topk"] or []]
        self.instances.append(
            Instance(
                id=len(self.instances) + 1,
                label=label,
                label_id=label_id,
                bbox=rle.bbox(segmentation),
                area=rle.area(segmentation),
                segmentation=segmentation,
                **kept,
            )
        )


class Numbers(dict[str, int]):
    """Labels numbered from 0: the given ones in order, then others in order of appearance."""

    def __init__(self, labels: Iterable[str] = ()):
        given = dict.fromkeys(arguments.strings("labels", labels))
        super().__init__({label: number for number, label in enumerate(given)})

    def of(self, label: str) -> int:
        return self.setdefault(label, len(self))


def visible(result: Labelled) -> list[Instance]:
    """Instances with a non-empty mask; label formats have no empty masks."""
    return [instance for instance in result if instance.area]


def stem(result: Labelled) -> str:
    """Path of an image's label file in a folder, without ending: that of the image itself if it is relative."""
    path = PurePosixPath((result.file_name or "").replace("\\", "/"))
    if not path.name:
        raise InputError("An image without a file_name cannot have a label file; set `results.file_name`.")
    inside = not (path.is_absolute() or ".." in path.parts or ":" in path.parts[0])
    return str(path.with_suffix("")) if inside else path.stem


class Stems:
    """Assigns a label file to each image; raises InputError if two images would share one."""

    def __init__(self) -> None:
        self.taken: dict[str, str | None] = {}

    def of(self, result: Labelled) -> str:
        name = stem(result)
        if name in self.taken:
            raise InputError(
                f"The images {self.taken[name]} and {result.file_name} would both have the label file {name!r}; "
                "rename one of them."
            )
        self.taken[name] = result.file_name
        return name


def files_below(folder: str | os.PathLike[str], endings: Sequence[str]) -> list[Path]:
    """Sorted files below a folder, or the given file itself; raises InputError if there are none. Folders, pipes and
    devices of such names are skipped with a warning."""
    path = Path(arguments.path("source", folder))
    below = path.rglob("*") if os.path.isdir(path) else ()
    named = [path] if os.path.isfile(path) else sorted(one for one in below if one.suffix.lower() in endings)
    found = only_files(named, folder)
    if not found:
        raise InputError(f"There is no {' or '.join(endings)} file in {folder}; check the path.")
    return found


def picture_of(folders: Iterable[Path], place: str) -> Path | None:
    """Find the image file of a path without ending below one of the folders."""
    for folder in folders:
        for ending in PICTURES:
            for path in (folder / f"{place}{ending}", folder / f"{place}{ending.upper()}"):
                if os.path.isfile(path):
                    return path
    return None


def upright_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file after its EXIF orientation, from its header."""
    try:
        with open_file(path) as image:
            width, height = stored_size(image)
            turned = orientation_of(image) >= 5
    except Exception as error:  # each decoder raises errors of its own
        raise InputError(f"{path} cannot be read ({error}); its label file needs its size.") from error
    return (width, height) if turned else (height, width)
