"""YOLO-seg: a text file for each image, a line for each instance: the number of its label, its polygon in [0, 1].

A line holds one polygon; parts and holes are connected to it by bridges without width
(`ovsam.ops.polygons.to_polygon`), so no instance is split and no hole is filled.
"""

import ast
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ovsam.errors import InputError
from ovsam.ops.files import write_text
from ovsam.ops.polygons import fill, to_polygon
from ovsam.ops.schema import Share, checked, place, read_text
from ovsam.processing import arguments
from ovsam.results.formats.base import (
    Labelled,
    LabelledImage,
    Stems,
    files_below,
    picture_of,
    upright_size,
    visible,
)


def to_yolo(result: Labelled, labels: Sequence[str] = (), tolerance: float = 0.0) -> str:
    """Return the lines of one image.

    Labels are numbered from 0: their index in `labels`, or `label_id` without. `tolerance` is as in `to_polygon`.

    Raises:
        InputError: a label is missing in `labels`.
    """
    height, width = result.size
    labels, tolerance = arguments.strings("labels", labels), arguments.number("tolerance", tolerance, 0, math.inf)
    number = {label: i for i, label in enumerate(labels)}
    lines = []
    for instance in visible(result):
        if labels and instance.label not in number:
            raise InputError(f"{instance.label!r} is not one of the {len(labels)} labels; add it to them.")
        corners = (to_polygon(instance.mask, tolerance) / [width, height]).ravel()
        label_id = number.get(instance.label, instance.label_id)
        lines.append(" ".join([str(label_id), *(f"{value:.6g}" for value in corners)]) + "\n")
    return "".join(lines)


def write_yolo(
    results: Iterable[Labelled], folder: str | os.PathLike[str], labels: Sequence[str], tolerance: float = 0.0
) -> None:
    """Write a YOLO-seg data set: labels/<image>.txt for every image, including those without instances,
    scores/<image>.txt with one score a line, and data.yaml with the names. Put the images into images/."""
    folder, stems = Path(folder), Stems()
    for result in results:
        name = stems.of(result)
        write_text(folder / "labels" / f"{name}.txt", to_yolo(result, labels, tolerance))
        write_text(folder / "scores" / f"{name}.txt", "".join(f"{one.score:.4f}\n" for one in visible(result)))
    lines = ["path: .", "train: images", "val: images", "names:"]
    lines += [f"  {i}: {json.dumps(label, ensure_ascii=False)}" for i, label in enumerate(labels)]
    write_text(folder / "data.yaml", "\n".join(lines) + "\n")


def read_yolo(
    folder: str | os.PathLike[str], images: str | os.PathLike[str] | None = None, labels: Sequence[str] = ()
) -> list[LabelledImage]:
    """Return the images of a YOLO-seg data set: labels/, and scores/ if it exists.

    Args:
        folder: folder of data.yaml, or of the label files alone.
        images: folder of the image files, whose sizes are needed; default: images/ beside labels/.
        labels: class names, in place of those of data.yaml.

    Raises:
        InputError: there are no names, an image file is missing, or a line is invalid.
    """
    root = Path(arguments.path("folder", folder))
    if images is not None:
        images = arguments.path("images", images)
    labels = arguments.strings("labels", labels)
    place = root / "labels" if os.path.isdir(root / "labels") else root
    labels = labels or _names(root if place != root else root.parent)
    pictures = [Path(images)] if images is not None else [place.parent / "images", place]
    found = []
    for file in files_below(place, (".txt",)):
        name = file.relative_to(place).with_suffix("").as_posix()
        picture = picture_of(pictures, name)
        if picture is None:
            raise InputError(f"There is no image {name} in {pictures[0]}; {file} needs its size.")
        base = next(one for one in pictures if picture.is_relative_to(one))
        image = LabelledImage(upright_size(picture), picture.relative_to(base).as_posix())
        beside = place.parent / "scores" / file.relative_to(place)
        listed = read_text(beside).split() if beside.is_file() else []
        scores = checked(listed, list[Share], str(beside), texts=True)
        lines = [line for line in read_text(file).splitlines() if line.strip()]
        for i, line in enumerate(lines):
            height, width = image.size
            try:
                number, *corners = line.split()
                points = np.array(corners, float).reshape(-1, 2) * [width, height]
                label = labels[int(number) if int(number) >= 0 else len(labels)]
            except (ValueError, IndexError) as error:
                raise InputError(
                    f"Line {i + 1} of {file} must be the number of one of {len(labels)} names and a polygon x, y, ..."
                ) from error
            try:
                segmentation = fill([points], height, width)
            except InputError as error:
                raise InputError(f"Line {i + 1} of {file} {error}.") from error
            score = scores[i] if len(scores) == len(lines) else 1.0
            image.add(label, int(number), segmentation, score=score)
        found.append(image)
    return found


def _names(folder: Path) -> list[str]:
    """Return the names of data.yaml or classes.txt. Only the YAML of such files is supported: a list in either style,
    or numbers with names."""
    classes, yaml = folder / "classes.txt", folder / "data.yaml"
    if classes.is_file():
        return read_text(classes).splitlines()
    if not yaml.is_file():
        raise InputError(f"There is no data.yaml in {folder}; it must give the names of the label numbers.")
    lines = iter(read_text(yaml).splitlines())
    first = next((line for line in lines if line.startswith("names:")), None)
    if first is None:
        raise InputError(f"{yaml} has no names; add a list `names`.")
    if inline := first.removeprefix("names:").strip():
        try:
            listed = ast.literal_eval(inline)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise InputError(
                f"{place('names', yaml)} cannot be read; it must be a list such as ['cat', 'dog']."
            ) from error
        return checked(list(listed.values()) if isinstance(listed, dict) else listed, list[str], f"names of {yaml}")
    names = []
    for line in lines:
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        if not (line.startswith((" ", "-"))):
            break
        name = entry.removeprefix("-").strip() if entry.startswith("-") else entry.partition(":")[2].strip()
        names.append(_unquoted(name, yaml))
    return names


def _unquoted(name: str, yaml: Path) -> str:
    if not name.startswith('"'):
        return name.strip("'")
    try:
        return checked(json.loads(name), str, f"names of {yaml}")
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{place('names', yaml)} has {name}, whose quotes do not match.") from error
