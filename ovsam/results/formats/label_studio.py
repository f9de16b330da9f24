"""Label Studio: a JSON file of tasks with predictions; masks in its own run lengths, polygons in percent.

Its run lengths have the format of thi.ng/rle-pack over the four channels of an RGBA image, row by row; they are not
COCO's.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict
from urllib.parse import parse_qs, urlparse
from xml.sax.saxutils import quoteattr

import msgspec
import numpy as np

from ovsam.errors import InputError
from ovsam.ops import rle
from ovsam.ops.files import write_text, write_whole
from ovsam.ops.polygons import fill, to_polygon
from ovsam.ops.schema import Coordinate, Point, Share, Side, checked, place, read_json
from ovsam.processing import arguments
from ovsam.results.formats.base import Labelled, LabelledImage, Numbers, visible

SHAPES = ("brush", "polygon", "rectangle")
SIZES = (3, 4, 8, 16)  # numbers of bits of the length of a run
Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]


class RegionValue(TypedDict, total=False):
    rle: list[Byte]
    points: list[Point]
    x: Coordinate
    y: Coordinate
    width: Coordinate
    height: Coordinate
    rotation: float | None
    labels: list[str]
    brushlabels: list[str]
    polygonlabels: list[str]
    rectanglelabels: list[str]


class Region(TypedDict, total=False):
    """Regions with a size are drawn on the image; others are choices, texts and relations."""

    id: str | int | None
    type: str
    value: RegionValue
    score: Share | None
    original_width: Side
    original_height: Side


class Answer(TypedDict, total=False):
    result: list[Region]
    was_cancelled: bool | None
    model_version: str | None


class Task(TypedDict):
    data: dict[str, Any]
    annotations: NotRequired[list[Answer] | None]
    predictions: NotRequired[list[Answer | int] | None]  # some exports list their ids


def to_label_studio(
    result: Labelled, shape: str = "brush", image_url: str = "", names: tuple[str, str] = ("label", "image")
) -> dict[str, Any]:
    """Return one task with a prediction.

    Args:
        shape: "brush" (exact), "polygon", which Label Studio can also export as COCO and YOLO, or "rectangle".
        image_url: prefix of the file name in `data.image`, such as "/data/local-files/?d=".
        names: names of the tags of the labels and of the image in the labelling interface.
    """
    _check(shape)
    height, width = result.size
    facts = {"from_name": names[0], "to_name": names[1], "type": f"{shape}labels", "image_rotation": 0}
    facts |= {"original_width": width, "original_height": height}
    regions, scores = [], []
    for instance in visible(result):
        value: dict[str, Any] = {f"{shape}labels": [instance.label]}
        if shape == "brush":
            value |= {"format": "rle", "rle": encode_rle(instance.mask)}
        elif shape == "rectangle":
            sides = np.array(instance.bbox) / [width, height, width, height] * 100
            value |= dict(zip(("x", "y", "width", "height"), sides.round(5).tolist(), strict=True)) | {"rotation": 0}
        else:
            points = to_polygon(instance.mask) / [width, height] * 100
            value |= {"points": points.round(5).tolist(), "closed": True}
        scores.append(instance.score)
        regions.append({"id": str(instance.id), **facts, "value": value, "score": round(instance.score, 4)})
    prediction: dict[str, Any] = {"model_version": result.model, "result": regions}
    if regions:  # a key to sort tasks by
        prediction["score"] = round(sum(scores) / len(scores), 4)
    name = result.file_name or ""
    data = {"image": f"{image_url}{name}", "file_name": name, "width": width, "height": height}
    return {"data": data, "predictions": [prediction]}


def write_label_studio(
    results: Iterable[Labelled],
    path: str | os.PathLike[str],
    labels: Iterable[str] = (),
    shape: str = "brush",
    image_url: str = "",
) -> None:
    """Write a JSON file of tasks, in the memory of one image, and <name>.xml beside it, the labelling interface for
    them. Raises InputError if the folder does not exist."""
    numbers = Numbers(labels)

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", errors="replace") as file:
            for place, result in enumerate(results):
                for instance in visible(result):
                    numbers.of(instance.label)
                task = to_label_studio(result, shape, image_url)
                file.write((",\n" if place else "[\n") + json.dumps(task, ensure_ascii=False))
            file.write("\n]\n" if file.tell() else "[]\n")

    write_whole(path, write)
    interface = labelling_interface(numbers, shape)
    write_text(Path(path).with_suffix(".xml"), interface)


def labelling_interface(labels: Iterable[str], shape: str = "brush") -> str:
    """Return the labelling interface (the "labeling config") for tasks of `to_label_studio`."""
    _check(shape)
    tag = f"{shape.title()}Labels"
    lines = ["<View>", '  <Image name="image" value="$image" zoom="true"/>', f'  <{tag} name="label" toName="image">']
    lines += [f"    <Label value={quoteattr(label)}/>" for label in labels]
    return "\n".join([*lines, f"  </{tag}>", "</View>"]) + "\n"


def read_label_studio(path: str | os.PathLike[str]) -> list[LabelledImage]:
    """Return the images of a JSON file of Label Studio: brushes, polygons and unrotated rectangles of the last
    annotation that was not cancelled, or else of the last prediction.

    Raises:
        InputError: the file is missing or has another format, an image has no size, or a region does not fit its image.
    """
    tasks = read_json(path)
    if not isinstance(tasks, list) or not all(isinstance(task, dict) and "data" in task for task in tasks):
        raise InputError(f"{path} is not a JSON file of Label Studio: it must be a list of tasks with data.")
    found, numbers = [], Numbers()
    for number, task in enumerate(checked(tasks, list[Task], str(path))):
        drawn = [one for one in task.get("annotations") or [] if not one.get("was_cancelled")]
        guessed = [one for one in task.get("predictions") or [] if isinstance(one, dict)]
        chosen = (drawn or guessed or [{}])[-1]
        sized = {"original_width", "original_height", "type", "value"}
        regions = [region for region in chosen.get("result", []) if sized <= region.keys()]
        data = task["data"]
        size = (data.get("height"), data.get("width"))
        if regions:
            size = regions[0]["original_height"], regions[0]["original_width"]
        if not all(size):
            raise InputError(f"{place(f'[{number}]', path)} has no size: it must have a region, or width and height.")
        size = checked(size, tuple[Side, Side], f"{place(f'[{number}].data', path)} (height, width)")
        image = LabelledImage(size, _file_name(data), model=chosen.get("model_version") or "")
        for region in regions:
            try:
                segmentation, label = _mask(region, image.size)
            except InputError as error:
                raise InputError(f"The region {region.get('id')} of {path}, task [{number}], {error}.") from error
            if segmentation is not None:
                known = {"score": float(region["score"])} if region.get("score") is not None else {}
                image.add(label, numbers.of(label), segmentation, **known)
        found.append(image)
    return found


def encode_rle(mask: np.ndarray) -> list[int]:
    """Encode a mask [H, W] bool as Label Studio's run lengths: the bytes of `mask2rle(mask * 255)` of its SDK."""
    flat = mask.ravel().astype(np.uint8) * 255
    starts = np.flatnonzero(np.diff(flat, prepend=~flat[:1]))
    lengths = 4 * np.diff(starts, append=len(flat))  # four channels
    bits = [f"{4 * len(flat):032b}", f"{8 - 1:05b}", *(f"{size - 1:04b}" for size in SIZES)]
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        value = f"{flat[start]:08b}"
        whole, rest = divmod(length - 1, 1 << SIZES[-1])  # the longest runs are written in several pieces
        bits += [f"1{len(SIZES) - 1:02b}{(1 << SIZES[-1]) - 1:016b}{value}"] * whole
        kind = next(i for i, size in enumerate(SIZES) if rest < 1 << size)
        bits.append(f"1{kind:02b}{rest:0{SIZES[kind]}b}{value}")
    written = "".join(bits)
    written += "0" * (8 - len(written) % 8)
    return list(int(written, 2).to_bytes(len(written) // 8, "big"))


def decode_rle(counts: Iterable[int], height: int, width: int) -> np.ndarray:
    """Decode Label Studio's run lengths into a mask [H, W]: the pixels whose alpha is not 0.

    Raises InputError if they do not fit an image of this size; the message lacks its subject.
    """
    bits = "".join(f"{byte:08b}" for byte in counts)
    place = 0

    def read(size: int) -> int:
        nonlocal place
        place += size
        return int(bits[place - size : place], 2)

    try:
        total, word = read(32), read(5) + 1
        sizes = [read(4) + 1 for _ in range(4)]
        if total != 4 * height * width:
            raise InputError(f"has run lengths of {total // 4} pixels; its image has {height * width}")
        if word != 8:
            raise InputError(f"has run lengths of {word} bits a value; Label Studio writes 8")
        pixels, at = np.zeros(total, dtype=np.uint8), 0
        while at < total:
            run, end = read(1), at + 1 + read(sizes[read(2)])
            if run:
                pixels[at:end] = read(word)
            else:
                pixels[at:end] = [read(word) for _ in range(at, end)]
            at = end
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError("has incomplete run lengths") from error
    return pixels.reshape(height, width, 4)[..., 3] > 0


def _mask(region: dict[str, Any], size: tuple[int, int]) -> tuple[rle.RLE | None, str]:
    height, width = size
    value, kind = region["value"], region["type"]
    named: Any = value.get(kind) or value.get("labels") or value.get("brushlabels")
    names = named if named and isinstance(named, list) else ["object"]
    if "rle" in value:
        return rle.encode(decode_rle(value["rle"], height, width)), names[0]
    if "points" in value:
        return fill([np.array(value["points"], float) / 100 * [width, height]], height, width), names[0]
    if {"x", "y", "width", "height"} <= value.keys() and not value.get("rotation") and kind.startswith("rectangle"):
        x1, y1 = value["x"], value["y"]
        x2, y2 = x1 + value["width"], y1 + value["height"]
        corners = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]]) / 100 * [width, height]
        return fill([corners], height, width), names[0]
    return None, names[0]


def _file_name(data: dict[str, Any]) -> str | None:
    if data.get("file_name"):
        return str(data["file_name"])
    try:
        address = urlparse(str(data.get("image") or next(iter(data.values()), "")))
    except ValueError:  # not an address
        return None
    local = parse_qs(address.query).get("d")
    return (local[0] if local else Path(address.path).name) or None


def _check(shape: str) -> None:
    arguments.choice("shape for Label Studio", shape, SHAPES)
