"""What the label formats share: the records that readers return, numbers of labels, names of label files."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from PIL import Image

from ovsam.errors import InputError
from ovsam.ops import rle
from ovsam.results.instance import Instance

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")


class Labelled(Protocol):
    """One image with its instances: `Results`, and what the readers return."""

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
        """Append an instance; what a format does not hold takes the values of an annotation made by hand."""
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
    """Labels numbered from 0: the given ones in their order, then others as they come."""

    def __init__(self, labels: Iterable[str] = ()):
        super().__init__({label: number for number, label in enumerate(dict.fromkeys(labels))})

    def of(self, label: str) -> int:
        return self.setdefault(label, len(self))


def visible(result: Labelled) -> list[Instance]:
    """The instances that have a pixel; label formats have no empty masks."""
    return [instance for instance in result if instance.area]


def stem(result: Labelled) -> str:
    """The place of an image's label file in a folder, without ending: the image's own place if that is relative."""
    path = PurePosixPath((result.file_name or "").replace("\\", "/"))
    if not path.name:
        raise InputError("A picture without a file_name cannot have a label file; set `results.file_name`.")
    inside = not (path.is_absolute() or ".." in path.parts or ":" in path.parts[0])
    return str(path.with_suffix("")) if inside else path.stem


class Stems:
    """Gives each image the place of its label file; raises InputError where two would share one."""

    def __init__(self) -> None:
        self.taken: dict[str, str | None] = {}

    def of(self, result: Labelled) -> str:
        name = stem(result)
        if name in self.taken:
            raise InputError(
                f"The pictures {self.taken[name]} and {result.file_name} would both have the label file {name!r}; "
                "rename one of them."
            )
        self.taken[name] = result.file_name
        return name


def load_json(path: str | os.PathLike[str]) -> Any:
    """Raises InputError for what is missing or no json."""
    if not Path(path).is_file():
        raise InputError(f"There is no file {path}; check the path.")
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not a json file: {error}.") from error


def files_below(folder: str | os.PathLike[str], endings: Sequence[str]) -> list[Path]:
    """Files below a folder, or the one file that is given, sorted; raises InputError if there is none."""
    path = Path(folder)
    found = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.suffix.lower() in endings)
    if not found:
        raise InputError(f"There is no {' or '.join(endings)} file in {folder}.")
    return found


def picture_of(folders: Iterable[Path], place: str) -> Path | None:
    """The image file at a place without ending below one of the folders."""
    for folder in folders:
        for ending in PICTURES:
            for path in (folder / f"{place}{ending}", folder / f"{place}{ending.upper()}"):
                if path.is_file():
                    return path
    return None


def upright_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file with its EXIF orientation applied, from its header."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) >= 5
    except Exception as error:  # each decoder has errors of its own
        raise InputError(f"{path} cannot be read ({error}), and its label file needs its size.") from error
    return (width, height) if turned else (height, width)
