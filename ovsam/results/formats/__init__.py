"""Label formats, one module each: `to_*` returns the record of one image, `write_*` writes a file or a folder, `read_*`
reads it.

Writers take any iterable of images and hold one in memory at a time. Masks are exact in every format except `masks`,
whose maps have one instance at each pixel.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ovsam.errors import InputError
from ovsam.ops.schema import read_json
from ovsam.processing import arguments
from ovsam.results.formats.base import Labelled, LabelledImage
from ovsam.results.formats.coco import read_coco, write_coco
from ovsam.results.formats.cvat import read_cvat, write_cvat
from ovsam.results.formats.geojson import read_geojson, write_geojson
from ovsam.results.formats.label_studio import read_label_studio, write_label_studio
from ovsam.results.formats.labelme import read_labelme, write_labelme
from ovsam.results.formats.masks import read_masks, write_masks
from ovsam.results.formats.yolo import read_yolo, write_yolo

FORMATS = {  # format -> ending of its file, or "" for a folder
    "coco": ".json",
    "yolo": "",
    "labelme": "",
    "cvat": ".xml",
    "label-studio": ".json",
    "geojson": "",
    "masks": "",
}


def check_format(name: str) -> str:
    """Return the name; raises InputError for an unknown format."""
    return arguments.choice("label format", name, FORMATS)


def write_labels(
    results: Iterable[Labelled],
    target: str | os.PathLike[str],
    format: str,
    labels: Sequence[str] = (),
    images: str | os.PathLike[str] | None = None,
) -> None:
    """Write images in a label format to a file or a folder, depending on the format (`FORMATS`).

    Args:
        labels: the label names in order; "yolo" needs all of them.
        images: the folder that file names are relative to: LabelMe's paths lead there, and GeoJSON takes its map
            coordinates from georeferenced images there.

    Raises:
        InputError: the format is unknown, a label is missing in those of "yolo", or two images have the same label
            file.
    """
    match check_format(format):
        case "coco":
            write_coco(results, target, labels)
        case "yolo":
            write_yolo(results, target, labels)
        case "labelme":
            write_labelme(results, target, images=images)
        case "cvat":
            write_cvat(results, target, labels)
        case "label-studio":
            write_label_studio(results, target, labels)
        case "geojson":
            write_geojson(results, target, images)
        case "masks":
            write_masks(results, target)


def read_labels(
    source: str | os.PathLike[str], format: str | None = None, images: str | os.PathLike[str] | None = None
) -> list[LabelledImage]:
    """Read the images of a label file or folder.

    Args:
        format: name of the format; by default recognised from the content.
        images: folder of the image files, for formats without image sizes ("yolo").

    Raises:
        InputError: the format is unknown or not recognised, or the files are invalid.
    """
    match recognise(source) if format is None else check_format(format):
        case "coco":
            return read_coco(source, images)
        case "yolo":
            return read_yolo(source, images)
        case "labelme":
            return read_labelme(source)
        case "cvat":
            return read_cvat(source)
        case "label-studio":
            return read_label_studio(source)
        case "geojson":
            return read_geojson(source)
        case _:
            return read_masks(source)


def recognise(source: str | os.PathLike[str]) -> str:
    """Return the format of a label file or folder; raises InputError if it is unknown."""
    path = Path(arguments.path("source", source))
    if not os.path.exists(path):
        raise InputError(f"There are no labels at {path}; check the path.")
    if os.path.isdir(path):
        if (path / "labels").is_dir() or (path / "data.yaml").is_file() or any(path.rglob("*.txt")):
            return "yolo"
        if any(path.rglob("*.geojson")):
            return "geojson"
        if any(path.rglob("*.xml")):
            raise InputError(f"{path} is a folder; CVAT's labels are one XML file: name that file.")
        example = next(iter(sorted(path.rglob("*.json"))), None)
        if example is None:
            raise InputError(f"{path} has no label files; name a folder or a file of labels.")
        if example.with_suffix(".png").is_file() and "instances" in read_json(example):
            return "masks"
        found = recognise(example)
        if found != "labelme":
            raise InputError(f"{path} is a folder; {found} is one file: name that file.")
        return found
    if path.suffix.lower() == ".xml":
        return "cvat"
    if path.suffix.lower() == ".geojson":
        return "geojson"
    if path.suffix.lower() == ".txt":
        raise InputError(f"{path} is one label file of YOLO; name the folder of its data.yaml.")
    if path.suffix.lower() == ".png":
        return "masks"
    content = read_json(path)
    if isinstance(content, list) and all(isinstance(task, dict) and "data" in task for task in content):
        return "label-studio"
    if isinstance(content, dict):
        for key, name in (("annotations", "coco"), ("shapes", "labelme"), ("features", "geojson")):
            if key in content:
                return name
    raise InputError(f"{path} has none of the supported formats, {', '.join(FORMATS)}.")
