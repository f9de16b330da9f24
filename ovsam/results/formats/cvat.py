"""CVAT for images 1.1: one XML file; masks as run lengths of their box, row by row, background first."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict
from xml.etree import ElementTree

import numpy as np

from ovsam.errors import InputError
from ovsam.ops import rle
from ovsam.ops.files import write_whole
from ovsam.ops.polygons import fill
from ovsam.ops.schema import Coordinate, Pixels, Point, Share, Side, checked
from ovsam.processing import arguments
from ovsam.results.formats.base import Labelled, LabelledImage, Numbers, visible
from ovsam.results.instance import Instance


class ImageFacts(TypedDict):
    height: Side
    width: Side


class MaskFacts(TypedDict):
    left: Pixels
    top: Pixels
    width: Pixels
    height: Pixels
    rle: str


class PolygonFacts(TypedDict):
    points: str


class BoxFacts(TypedDict):
    xtl: Coordinate
    ytl: Coordinate
    xbr: Coordinate
    ybr: Coordinate


def to_cvat(result: Labelled, image_id: int = 0) -> ElementTree.Element:
    """Return the element <image> of one image, with one <mask> for each instance; scores are attributes of masks."""
    height, width = result.size
    facts = {"id": image_id, "name": result.file_name or "", "width": width, "height": height}
    image = _element("image", facts)
    for instance in visible(result):
        mask = _element(
            "mask", {"label": instance.label, "source": "auto", "occluded": 0, **_run_lengths(instance), "z_order": 0}
        )
        score = _element("attribute", {"name": "score"})
        score.text = f"{instance.score:.4f}"
        mask.append(score)
        image.append(mask)
    return image


def write_cvat(results: Iterable[Labelled], path: str | os.PathLike[str], labels: Iterable[str] = ()) -> None:
    """Write images to one XML file of CVAT for images 1.1, in the memory of one image.

    Its <meta> lists the labels, those of `labels` first. Raises InputError if its folder does not exist.
    """

    def write(temporary: Path) -> None:
        numbers = Numbers(labels)
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as images,
            open(temporary, "w", encoding="utf-8", errors="replace") as file,
        ):
            for image_id, result in enumerate(results):
                for instance in visible(result):
                    numbers.of(instance.label)
                images.write(ElementTree.tostring(to_cvat(result, image_id), encoding="unicode") + "\n")
            file.write('<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n')
            file.write(ElementTree.tostring(_meta(numbers), encoding="unicode") + "\n")
            images.seek(0)
            while chunk := images.read(1 << 20):
                file.write(chunk)
            file.write("</annotations>\n")

    write_whole(path, write)


def read_cvat(path: str | os.PathLike[str]) -> list[LabelledImage]:
    """Return the images of an XML file of CVAT for images 1.1: masks, polygons and unrotated boxes.

    Tags, points and lines have no area and are skipped.

    Raises:
        InputError: the file is missing, has another format, or a shape does not fit its image.
    """
    if not os.path.isfile(arguments.path("path", path)):
        raise InputError(f"There is no file {path}; check the path.")
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # also unknown encodings
        raise InputError(f"{path} is not an XML file: {error}.") from error
    if root.tag != "annotations" or root.find("track") is not None:
        raise InputError(
            f"{path} is not a file of CVAT for images 1.1: it must be <annotations> with <image> elements."
        )
    numbers, found = Numbers(name.text or "" for name in root.iterfind("meta//label/name")), []
    for element in root.iterfind("image"):
        where = f"the image {element.get('name')!r} of {path}"
        facts = checked(element.attrib, ImageFacts, where, texts=True)
        size = facts["height"], facts["width"]
        image = LabelledImage(size, element.get("name") or None)
        for shape in element:
            label = shape.get("label", "")
            source = f"a {shape.tag} of {where}"
            segmentation = _mask(shape, size, source)
            if segmentation is not None:
                score = shape.find("attribute[@name='score']")
                text = "" if score is None else score.text
                known = {"score": checked(text, Share, f"the score of {source}", texts=True)} if text else {}
                image.add(label, numbers.of(label), segmentation, **known)
        found.append(image)
    return found


def _run_lengths(instance: Instance) -> dict[str, Any]:
    x1, y1, x2, y2 = (int(value) for value in instance.box)
    flat = instance.mask[y1:y2, x1:x2].ravel()
    counts = np.diff(np.flatnonzero(np.diff(flat)) + 1, prepend=0, append=len(flat)).tolist()
    counts = [0, *counts] if flat[0] else counts
    return {"rle": ", ".join(map(str, counts)), "left": x1, "top": y1, "width": x2 - x1, "height": y2 - y1}


def _mask(shape: ElementTree.Element, size: tuple[int, int], source: str) -> rle.RLE | None:
    if shape.tag == "mask":
        facts = checked(shape.attrib, MaskFacts, source, texts=True)
        counts = checked(facts["rle"].replace(" ", "").split(","), list[Pixels], f"the rle of {source}", texts=True)
        if sum(counts) != facts["width"] * facts["height"]:
            raise InputError(f"The rle of {source} does not add up to {facts['width'] * facts['height']} pixels.")
        if facts["left"] + facts["width"] > size[1] or facts["top"] + facts["height"] > size[0]:
            raise InputError(f"The box of {source} lies outside of it.")
        flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        return rle.encode(flat.reshape(facts["height"], facts["width"]), facts["left"], facts["top"], size)
    if shape.tag == "polygon":
        text = checked(shape.attrib, PolygonFacts, source)["points"]
        corners = [point.split(",") for point in text.replace(" ", "").split(";")]
        return _fill(checked(corners, list[Point], f"the points of {source}", texts=True), size, source)
    if shape.tag == "box" and (shape.get("rotation") or "0").strip("0.") == "":
        x1, y1, x2, y2 = (checked(shape.attrib, BoxFacts, source, texts=True)[key] for key in BoxFacts.__annotations__)
        return _fill([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], size, source)
    return None


def _fill(corners: list[list[float]], size: tuple[int, int], source: str) -> rle.RLE:
    try:
        return fill([corners], *size)
    except InputError as error:
        raise InputError(f"A{source[1:]} {error}.") from error


def _meta(labels: Iterable[str]) -> ElementTree.Element:
    meta = _element("meta")
    list_of_labels = _nest(meta, "task", "labels")
    for name in labels:
        label = _nest(list_of_labels, "label")
        _nest(label, "name").text = name
        attribute = _nest(label, "attributes", "attribute")
        for key, value in (("name", "score"), ("mutable", "False"), ("input_type", "text")):
            _nest(attribute, key).text = value
        for key in ("default_value", "values"):
            _nest(attribute, key).text = ""
    return meta


def _nest(parent: ElementTree.Element, *tags: str) -> ElementTree.Element:
    for tag in tags:
        parent = ElementTree.SubElement(parent, tag)
    return parent


def _element(tag: str, facts: dict[str, Any] | None = None) -> ElementTree.Element:
    return ElementTree.Element(tag, {key: str(value) for key, value in (facts or {}).items()})
