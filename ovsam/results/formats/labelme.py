"""LabelMe: a JSON file for each image, with polygons, or masks cropped to their box as PNG."""

import base64
import io
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
from PIL import Image

from ovsam.errors import InputError
from ovsam.ops import rle
from ovsam.ops.files import write_text
from ovsam.ops.polygons import fill, to_polygon
from ovsam.ops.schema import Point, Side, checked, place, read_json
from ovsam.processing import arguments
from ovsam.processing.images import open_file
from ovsam.results.formats.base import Labelled, LabelledImage, Numbers, Stems, files_below, visible

LEAST = {"rectangle": 2, "circle": 2, "mask": 2, "polygon": 3}  # numbers of points


class Shape(TypedDict):
    label: str
    points: list[Point]
    shape_type: NotRequired[str | None]
    mask: NotRequired[str | None]
    description: NotRequired[str | None]


class LabelmeFile(TypedDict):
    shapes: list[Shape]
    imageHeight: Side
    imageWidth: Side
    imagePath: NotRequired[str | None]


def to_labelme(result: Labelled, shape: str = "polygon", tolerance: float = 0.0) -> dict[str, Any]:
    """Return the LabelMe record of one image.

    shape: "polygon", which every tool reads (parts and holes are connected by bridges without width), or "mask".
    """
    arguments.choice("shape for LabelMe", shape, ("polygon", "mask"))
    tolerance = arguments.number("tolerance", tolerance, 0, math.inf)
    height, width = result.size
    shapes = []
    for instance in visible(result):
        drawn: dict[str, Any] = {"label": instance.label, "group_id": None, "flags": {}, "shape_type": shape}
        if shape == "polygon":
            drawn |= {"points": to_polygon(instance.mask, tolerance).tolist()}
        else:
            x1, y1, x2, y2 = (int(value) for value in instance.box)
            drawn |= {"points": [[x1, y1], [x2 - 1, y2 - 1]], "mask": _to_png(instance.mask[y1:y2, x1:x2])}
        shapes.append(drawn | {"description": f"score {instance.score:.4f}"})
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": result.file_name or "",
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }


def write_labelme(
    results: Iterable[Labelled],
    folder: str | os.PathLike[str],
    shape: str = "polygon",
    images: str | os.PathLike[str] | None = None,
) -> None:
    """Write LabelMe's <image>.json for every image.

    images: the folder that file names are relative to; LabelMe resolves the path of an image from its JSON file.
    Without it, each image is expected beside its JSON file.
    """
    stems = Stems()
    for result in results:
        path = Path(folder) / f"{stems.of(result)}.json"
        record = to_labelme(result, shape)
        image = Path(record["imagePath"])
        if images is not None:
            image = Path(os.path.relpath(Path(images) / image, path.parent))
        record["imagePath"] = image.as_posix() if images is not None else image.name
        write_text(path, json.dumps(record, ensure_ascii=False))


def read_labelme(source: str | os.PathLike[str]) -> list[LabelledImage]:
    """Return the images of LabelMe's JSON files in a folder, or of one file: polygons, rectangles, circles and masks.

    Points and lines have no area and are skipped.

    Raises:
        InputError: a file is missing, has another format, or a shape does not fit its image.
    """
    found, numbers = [], Numbers()
    for path in files_below(source, (".json",)):
        record = read_json(path)
        if not isinstance(record, dict) or not {"shapes", "imageHeight", "imageWidth"} <= record.keys():
            raise InputError(f"{path} is not a file of LabelMe: it must have shapes, imageHeight and imageWidth.")
        record = checked(record, LabelmeFile, str(path))
        root = path.parent if os.path.isfile(source) else Path(source)
        name = Path((record.get("imagePath") or path.stem).replace("\\", "/")).name
        image = LabelledImage(
            (record["imageHeight"], record["imageWidth"]), (path.parent.relative_to(root) / name).as_posix()
        )
        for number, shape in enumerate(record["shapes"]):
            try:
                segmentation = _mask(shape, image.size)
            except InputError as error:
                raise InputError(f"{place(f'shapes[{number}]', path)} {error}.") from error
            if segmentation is not None:
                score = re.search(r"score ([01]\.\d+)", shape.get("description") or "")
                known = {"score": float(score[1])} if score else {}
                image.add(shape["label"], numbers.of(shape["label"]), segmentation, **known)
        found.append(image)
    return found


def _mask(shape: dict[str, Any], size: tuple[int, int]) -> rle.RLE | None:
    height, width = size
    kind, points = shape.get("shape_type") or "polygon", np.array(shape["points"], float)
    if len(points) < LEAST.get(kind, 0):
        raise InputError(f"is a {kind} of {len(points)} points; it must have {LEAST[kind]} or more")
    if kind == "mask":
        x, y = points[0].astype(int).tolist()
        part = _from_png(shape.get("mask") or "")
        if not (0 <= x and 0 <= y and x + part.shape[1] <= width and y + part.shape[0] <= height):
            raise InputError("has a mask that lies outside its image")
        return rle.encode(part, x, y, size)
    if kind == "rectangle":
        (x1, y1), (x2, y2) = points[:2]
        points = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
    elif kind == "circle":  # its centre and a point on it
        angles = np.linspace(0, 2 * np.pi, 180, endpoint=False)
        points = points[0] + np.hypot(*(points[1] - points[0])) * np.stack([np.cos(angles), np.sin(angles)], 1)
        points = points.clip(0, [width, height])
    elif kind != "polygon":
        return None
    return fill([points], height, width)


def _from_png(text: str) -> np.ndarray:
    try:
        part = np.asarray(open_file(io.BytesIO(base64.b64decode(text))))
    except Exception as error:  # each decoder raises errors of its own
        raise InputError("has a mask that is not a PNG in base64") from error
    if part.ndim != 2:
        raise InputError("has a mask in colours; it must be black and white")
    return part.astype(bool)


def _to_png(mask: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
